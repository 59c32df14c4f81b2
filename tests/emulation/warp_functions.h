// Warp-wide functions of the device language: shuffles, votes, matches, reductions.
// __activemask() is missing on purpose: what it returns is not specified.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device_thread.h"

namespace emulation {

template <typename Body>
void for_each_lane(uint32_t mask, const Body& body) {
  for (uint32_t left = mask; left != 0; left &= left - 1) body(std::countr_zero(left));
}

template <typename T>
struct ShuffleOperand {
  T value;
  int source;
};

template <typename T>
void run_shuffle(void* const* operands, uint32_t mask) {
  const auto operand = [&](int lane) -> ShuffleOperand<T>& {
    return *static_cast<ShuffleOperand<T>*>(operands[lane]);
  };
  T taken[32];
  for_each_lane(mask, [&](int lane) {
    const int source = operand(lane).source;
    if ((mask >> source & 1) == 0) {
      fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which is not in the mask");
    }
    taken[lane] = operand(source).value;
  });
  for_each_lane(mask, [&](int lane) { operand(lane).value = taken[lane]; });
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
  static_assert(std::is_arithmetic_v<T> || (std::is_trivially_copyable_v<T> && sizeof(T) <= 4),
                "not a type that shuffles take");
  ShuffleOperand<T> operand{value, source};
  warp_collective(run_shuffle<T>, name, mask, &operand, site);
  return operand.value;
}

struct BallotOperand {
  int predicate;
  unsigned result;
};

inline void run_ballot(void* const* operands, uint32_t mask) {
  unsigned result = 0;
  for_each_lane(mask, [&](int lane) {
    if (static_cast<BallotOperand*>(operands[lane])->predicate != 0) result |= 1u << lane;
  });
  for_each_lane(mask,
                [&](int lane) { static_cast<BallotOperand*>(operands[lane])->result = result; });
}

inline unsigned ballot(unsigned mask, int predicate, const char* name, Site site) {
  BallotOperand operand{predicate, 0};
  warp_collective(run_ballot, name, mask, &operand, site);
  return operand.result;
}

template <typename T>
struct MatchOperand {
  T value;
  unsigned result;
};

template <typename T>
void run_match(void* const* operands, uint32_t mask) {
  const auto operand = [&](int lane) -> MatchOperand<T>& {
    return *static_cast<MatchOperand<T>*>(operands[lane]);
  };
  for_each_lane(mask, [&](int lane) {
    operand(lane).result = 0;
    for_each_lane(mask, [&](int other) {
      if (operand(other).value == operand(lane).value) operand(lane).result |= 1u << other;
    });
  });
}

template <typename T, typename Combine>
void run_reduction(void* const* operands, uint32_t mask) {
  T result = *static_cast<T*>(operands[std::countr_zero(mask)]);
  for_each_lane(mask & (mask - 1),
                [&](int lane) { result = Combine()(result, *static_cast<T*>(operands[lane])); });
  for_each_lane(mask, [&](int lane) { *static_cast<T*>(operands[lane]) = result; });
}

template <typename Combine, typename T>
T reduce(unsigned mask, T value, const char* name, Site site) {
  warp_collective(run_reduction<T, Combine>, name, mask, &value, site);
  return value;
}

// Wraps around like the hardware, for int too.
struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct And {
  unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};
struct Or {
  unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct Xor {
  unsigned operator()(unsigned a, unsigned b) const { return a ^ b; }
};

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulation::Site site = emulation::Site::current()) {
  emulation::warp_collective([](void* const*, uint32_t) {}, "__syncwarp", mask, nullptr, site,
                             true);
}

// Lanes beyond a group of `width` keep their own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::current_lane();
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return emulation::shuffle(mask, value, from, "__shfl_sync", site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::current_lane();
  const int from = lane ^ lane_mask;
  return emulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from,
                            "__shfl_xor_sync", site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::current_lane();
  const int from = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from,
                            "__shfl_up_sync", site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::current_lane();
  const int from = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from,
                            "__shfl_down_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate, "__all_sync", site) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          emulation::Site site = emulation::Site::current()) {
  emulation::MatchOperand<T> operand{value, 0};
  emulation::warp_collective(emulation::run_match<T>, "__match_any_sync", mask, &operand, site);
  return operand.result;
}

#define FRSPEC_EMULATION_REDUCTION(name, Combine, T)                                         \
  inline T name(unsigned mask, T value, emulation::Site site = emulation::Site::current()) { \
    return emulation::reduce<emulation::Combine>(mask, value, #name, site);                  \
  }
FRSPEC_EMULATION_REDUCTION(__reduce_add_sync, Add, unsigned)
FRSPEC_EMULATION_REDUCTION(__reduce_add_sync, Add, int)
FRSPEC_EMULATION_REDUCTION(__reduce_min_sync, Min, unsigned)
FRSPEC_EMULATION_REDUCTION(__reduce_min_sync, Min, int)
FRSPEC_EMULATION_REDUCTION(__reduce_max_sync, Max, unsigned)
FRSPEC_EMULATION_REDUCTION(__reduce_max_sync, Max, int)
FRSPEC_EMULATION_REDUCTION(__reduce_and_sync, And, unsigned)
FRSPEC_EMULATION_REDUCTION(__reduce_or_sync, Or, unsigned)
FRSPEC_EMULATION_REDUCTION(__reduce_xor_sync, Xor, unsigned)
#undef FRSPEC_EMULATION_REDUCTION
