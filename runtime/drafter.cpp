#include "drafter.h"

#include "check.h"
#include "eagle.h"
#include "medusa.h"

namespace frspec {

const char* method_name(Method method) {
  switch (method) {
    case Method::kPlain:
      return "plain";
    case Method::kEagle2:
      return "eagle2";
    case Method::kMedusa:
      return "medusa";
  }
  return "?";
}

Method parse_method(const std::string& name) {
  for (const Method method : {Method::kPlain, Method::kEagle2, Method::kMedusa}) {
    if (name == method_name(method)) return method;
  }
  throw RequestError(concat("unknown method '", name, "'; expected 'plain', 'eagle2' or 'medusa'"));
}

void check_draft_sizes(const std::string& folder, int64_t hidden_size, int64_t vocab_size,
                       const ModelConfig& target) {
  FRSPEC_CHECK(hidden_size == 0 || hidden_size == target.hidden_size, ModelError, folder,
               ": the drafter's hidden_size must equal the target's: expected ", target.hidden_size,
               ", found ", hidden_size);
  FRSPEC_CHECK(vocab_size == 0 || vocab_size == target.vocab_size, ModelError, folder,
               ": the drafter's vocab_size must equal the target's: expected ", target.vocab_size,
               ", found ", vocab_size);
}

std::unique_ptr<DraftModel> open_draft_model(const std::string& folder, const ModelConfig& target,
                                             const std::vector<int32_t>& sub_vocab,
                                             const TreeShape& shape,
                                             const MedusaTreeOptions* medusa_tree) {
  const std::optional<MedusaConfig> medusa = read_medusa_config(folder);
  if (medusa) {
    return std::make_unique<Medusa>(folder, *medusa, target, sub_vocab, shape,
                                    medusa_tree == nullptr ? MedusaTreeOptions{} : *medusa_tree);
  }
  FRSPEC_CHECK(medusa_tree == nullptr, RequestError, folder,
               ": medusa_choices: expected a Medusa drafter, found an EAGLE drafter");
  return std::make_unique<Eagle>(folder, target, sub_vocab, shape);
}

}  // namespace frspec
