// Keys and values of every layer of a network, planned for a fixed number of slots.
//
// Slots [0, length) hold the committed tokens in order. Tokens in flight (a draft tree, a beam) sit
// in the slots behind; committing moves the accepted ones forward in place, the rest are
// overwritten later.
#pragma once

#include <vector>

#include "arena.h"
#include "backend.h"
#include "config.h"

namespace frspec {

struct KvCache {
  std::vector<KvLayer> layers;
  int64_t length = 0;  // committed tokens

  void layout(const Backend& backend, Arena& arena, const char* plan_name,
              const ModelConfig& config, DType weight_dtype, int64_t slots) {
    slots = (slots + kKvSlotMultiple - 1) / kKvSlotMultiple * kKvSlotMultiple;
    KvLayer planned;
    planned.dtype = backend.kv_dtype(weight_dtype);
    planned.heads = config.num_kv_heads;
    planned.slots = slots;
    planned.head_dim = config.head_dim;
    layers.assign(static_cast<size_t>(config.num_layers), planned);
    for (KvLayer& layer : layers) {
      layer.keys = arena.take(plan_name, backend.kv_bytes(layer));
      layer.values = arena.take(plan_name, backend.kv_bytes(layer));
    }
  }
};

}  // namespace frspec
