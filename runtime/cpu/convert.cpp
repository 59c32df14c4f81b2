#include "cpu/convert.h"

#include <bit>
#include <cstring>

namespace frspec::cpu {
namespace {

float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

float from_f16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t sign = (half & 0x8000u) << 16;
  // Scaling by 2^112 moves the exponent from bias 15 to bias 127, subnormals included.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 puts the subnormal's bits at the end of the mantissa, rounded.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

template <typename To, typename From, typename Function>
void map(void* destination, const void* source, int64_t count, const Function& function) {
  To* to = static_cast<To*>(destination);
  const From* from = static_cast<const From*>(source);
  for (int64_t i = 0; i < count; ++i) to[i] = function(from[i]);
}

}  // namespace

void convert(void* destination, DType to, const void* source, DType from, int64_t count) {
  if (to == from) {
    std::memcpy(destination, source, static_cast<size_t>(count) * dtype_size(to));
  } else if (to == DType::kF32 && from == DType::kBF16) {
    map<float, uint16_t>(destination, source, count, from_bf16);
  } else if (to == DType::kF32) {
    map<float, uint16_t>(destination, source, count, from_f16);
  } else if (from == DType::kF32 && to == DType::kBF16) {
    map<uint16_t, float>(destination, source, count, to_bf16);
  } else if (from == DType::kF32) {
    map<uint16_t, float>(destination, source, count, to_f16);
  } else if (to == DType::kBF16) {
    map<uint16_t, uint16_t>(destination, source, count,
                            [](uint16_t bits) { return to_bf16(from_f16(bits)); });
  } else {
    map<uint16_t, uint16_t>(destination, source, count,
                            [](uint16_t bits) { return to_f16(from_bf16(bits)); });
  }
}

}  // namespace frspec::cpu
