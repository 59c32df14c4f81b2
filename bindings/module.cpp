// Python sees the engine as it is: typed arrays in, lists out, the GIL released while it works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "cpu/thread_pool.h"
#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;
using frspec::Engine;

namespace {

using TokenArray = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
nb::object make_array(std::vector<T> values, std::initializer_list<size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(owned->data(), shape.size(), shape.begin(), owner));
}

const char* finish_reason_name(frspec::FinishReason reason) {
  switch (reason) {
    case frspec::FinishReason::kStop:
      return "stop";
    case frspec::FinishReason::kLength:
      return "length";
    case frspec::FinishReason::kNone:
      break;
  }
  return nullptr;
}

// The Python classes live in frspec.errors, so that pure Python modules share them.
void raise_as(const char* class_name, const char* message) {
  nb::object error = nb::module_::import_("frspec.errors").attr(class_name);
  PyErr_SetString(error.ptr(), message);
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const frspec::ModelError& error) {
    raise_as("ModelError", error.what());
  } catch (const frspec::RankingError& error) {
    raise_as("RankingError", error.what());
  } catch (const frspec::RequestError& error) {
    raise_as("RequestError", error.what());
  } catch (const frspec::MemoryPlanError& error) {
    raise_as("MemoryPlanError", error.what());
  } catch (const frspec::DeviceError& error) {
    raise_as("DeviceError", error.what());
  } catch (const frspec::Error& error) {
    raise_as("FrspecError", error.what());
  }
}

nb::tuple as_tuple(const frspec::TreeShape& tree) {
  return nb::make_tuple(tree.depth, tree.topk, tree.tokens, tree.min_probability);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The compiled runtime of frspec. Use frspec.Generator.";
  nb::register_exception_translator(translate);

  m.def(
      "devices",
      [] {
        nb::list devices;
        for (const char* name : {"cpu", "cuda"}) {
          nb::dict device;
          device["name"] = name;
          try {
            const frspec::DeviceInfo info = frspec::make_backend(name, 0)->info();
            device["available"] = true;
            device["description"] = info.description;
            device["available_bytes"] = info.available_bytes;
          } catch (const frspec::Error& error) {  // absent, or without any free memory
            device["available"] = false;
            device["description"] = error.what();
            device["available_bytes"] = 0;
          }
          devices.append(device);
        }
        return devices;
      },
      nb::sig("def devices() -> list[dict[str, typing.Any]]"),
      "The kinds of device of this build: name, available, description (or why it is not),"
      " available_bytes.");

  m.def("usable_threads", &frspec::cpu::usable_threads, nb::sig("def usable_threads() -> int"),
        "CPUs that this process may use: scheduler affinity and cgroup quota.");

  m.def("cuda_build", &frspec::cuda_build, nb::sig("def cuda_build() -> str"),
        "What the CUDA backend was compiled with and for, or \"none: \" and why there is none.");

  m.def("published_medusa_trees", &frspec::published_medusa_trees,
        "The names that medusa_published may have.");

  m.def(
      "default_tree",
      [](const std::string& device) {
        constexpr int kThreads = 1;  // none of them works
        return as_tuple(frspec::make_backend(device, kThreads)->default_tree());
      },
      "device"_a, nb::sig("def default_tree(device: str) -> tuple[int, int, int, float]"),
      "Depth, topk, tokens and min_probability of the draft tree that suits a device.");

  nb::class_<Engine>(m, "Engine", "Target, drafter and memory; one sequence at a time.")
      .def(
          "__init__",
          [](Engine* self, std::string model, std::optional<std::string> drafter,
             std::optional<std::string> ranking, int64_t draft_vocab_size,
             std::string tokenizer_fingerprint, std::string device,
             std::optional<std::string> dtype, int64_t max_context, size_t memory_limit,
             int threads, std::optional<std::tuple<int, int, int, double>> tree,
             std::optional<std::string> medusa_published, frspec::MedusaChoices medusa_paths,
             std::vector<std::vector<double>> medusa_accuracies) {
            frspec::EngineOptions options;
            options.model = std::move(model);
            options.drafter = std::move(drafter);
            options.ranking = std::move(ranking);
            options.draft_vocab_size = draft_vocab_size;
            options.tokenizer_fingerprint = std::move(tokenizer_fingerprint);
            options.device = std::move(device);
            options.dtype = std::move(dtype);
            options.max_context = max_context;
            options.memory_limit = memory_limit;
            options.threads = threads;
            if (tree) {
              const auto& [depth, topk, tokens, min_probability] = *tree;
              options.tree = frspec::TreeShape{depth, topk, tokens, min_probability};
            }
            if (medusa_published || !medusa_paths.empty() || !medusa_accuracies.empty()) {
              options.medusa_tree = {std::move(medusa_paths), std::move(medusa_accuracies),
                                     medusa_published.value_or("")};
            }
            nb::gil_scoped_release release;
            new (self) Engine(options);
          },
          "model"_a, nb::kw_only(), "drafter"_a = nb::none(), "ranking"_a = nb::none(),
          "draft_vocab_size"_a = 0, "tokenizer_fingerprint"_a = "", "device"_a = "auto",
          "dtype"_a = nb::none(), "max_context"_a = 0, "memory_limit"_a = 0, "threads"_a = 0,
          "tree"_a = nb::none(), "medusa_published"_a = nb::none(),
          "medusa_paths"_a = frspec::MedusaChoices{},
          "medusa_accuracies"_a = std::vector<std::vector<double>>{},
          "Reads configs and headers and plans the memory; no weight is read.")
      .def("load", &Engine::load, nb::call_guard<nb::gil_scoped_release>(),
           "Takes the planned memory and loads the weights.")
      .def_prop_ro(
          "plan",
          [](const Engine& self) {
            std::vector<std::pair<std::string, size_t>> items;
            for (const auto& item : self.plan().items) items.emplace_back(item.name, item.bytes);
            return items;
          },
          "The memory plan: (name, bytes) of each part.")
      .def_prop_ro("device", [](const Engine& self) { return self.device().name; })
      .def_prop_ro("device_description",
                   [](const Engine& self) { return self.device().description; })
      .def_prop_ro(
          "available_bytes", [](const Engine& self) { return self.device().available_bytes; },
          "Memory that the device still has.")
      .def_prop_ro("dtype",
                   [](const Engine& self) { return std::string(dtype_name(self.dtype())); })
      .def_prop_ro("max_context", &Engine::max_context)
      .def_prop_ro(
          "tree", [](const Engine& self) { return as_tuple(self.tree()); },
          nb::sig("def tree(self) -> tuple[int, int, int, float]"),
          "Depth, topk, tokens and min_probability of the drafts.")
      .def_prop_ro("vocab_size", [](const Engine& self) { return self.config().vocab_size; })
      .def_prop_ro("eos_token_ids", [](const Engine& self) { return self.config().eos_token_ids; })
      .def_prop_ro(
          "draft_method",
          [](const Engine& self) { return std::string(method_name(self.draft_method())); },
          "The method of the drafter, \"plain\" without one.")
      .def_prop_ro("draft_vocab_size", &Engine::draft_vocab_size,
                   "Columns of the draft head; 0 without a drafter.")
      .def_prop_ro("step_bytes", &Engine::step_bytes,
                   "Weight bytes that a plain decoding step reads.")
      .def(
          "start",
          [](Engine& self, const TokenArray& tokens, const std::string& method,
             int64_t max_new_tokens, float temperature, int32_t top_k, float top_p, float min_p,
             uint64_t seed, bool ignore_eos) {
            frspec::Request request;
            request.method = frspec::parse_method(method);
            request.sampling = {temperature, top_k, top_p, min_p, seed};
            request.max_new_tokens = max_new_tokens;
            request.ignore_eos = ignore_eos;
            self.start({tokens.data(), tokens.size()}, request);
          },
          "token_ids"_a, nb::kw_only(), "method"_a = "plain", "max_new_tokens"_a = 256,
          "temperature"_a = 0.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f, "seed"_a = 0,
          "ignore_eos"_a = false,
          "Begins a sequence; the prefix it shares with the previous one is not computed again.")
      .def(
          "step",
          [](Engine& self) {
            std::span<const int32_t> tokens;
            {
              nb::gil_scoped_release release;
              tokens = self.step();
            }
            return std::vector<int32_t>(tokens.begin(), tokens.end());
          },
          "One chunk of the prompt or one round; returns the new tokens.")
      .def_prop_ro(
          "finish_reason",
          [](const Engine& self) { return finish_reason_name(self.finish_reason()); },
          nb::sig("def finish_reason(self) -> str | None"),
          "'stop', 'length', or None while the sequence goes on.")
      .def_prop_ro("accept_lengths", &Engine::accept_lengths, "Tokens emitted by each round.")
      .def_prop_ro("reused_tokens", &Engine::reused_tokens)
      .def_prop_ro(
          "timings",
          [](const Engine& self) {
            const frspec::Timings& t = self.timings();
            nb::dict seconds;
            seconds["prefill"] = t.prefill;
            seconds["draft"] = t.draft;
            seconds["verify"] = t.verify;
            seconds["rest"] = t.rest;
            return seconds;
          },
          nb::sig("def timings(self) -> dict[str, float]"), "Seconds since start().")
      .def(
          "last_tree",
          [](const Engine& self) {
            Engine::LastRound last = self.last_round();
            const size_t nodes = last.tokens.size();
            return nb::make_tuple(make_array(std::move(last.tokens), {nodes}),
                                  make_array(std::move(last.parents), {nodes}));
          },
          nb::sig("def last_tree(self) -> tuple[numpy.ndarray, numpy.ndarray]"),
          "Tokens and parents (int32 [nodes]) of the tree that the latest round verified.")
      .def(
          "last_logits",
          [](const Engine& self) {
            Engine::LastRound last = self.last_round();
            const auto vocab = static_cast<size_t>(self.config().vocab_size);
            const size_t rows = last.logits.size() / vocab;
            return make_array(std::move(last.logits), {rows, vocab});
          },
          nb::sig("def last_logits(self) -> numpy.ndarray"),
          "The target's logits (float32 [nodes, vocabulary]) of the latest step.");
}
