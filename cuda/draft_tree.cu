// The draft tree on the device, in kernels of one block: growing the beam, keeping the best
// candidates, filling a tree of fixed shape, walking the tree, committing the accepted path. What
// is done for each candidate and node is in runtime/draft_tree.h, shared with the CPU.
#include "block_select.cuh"
#include "config.h"
#include "draft_tree.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.cuh"

namespace frspec::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int kMostRanked = 1024;  // candidates whose places are found by comparing all

// Adds the candidates of a level to the pool; the topk best of them become the beam, best first.
__global__ void __launch_bounds__(kThreads, 1)
    expand_beam_kernel(const DraftPool pool, const DraftLevel level) {
  SHARED(SelectScratch<kThreads>, select);
  SHARED(uint64_t, entries, [kMaxTreeTopK * kMaxTreeTopK]);
  SHARED(uint64_t, kept, [kMaxTreeTopK]);
  dependency_launch();
  dependency_wait();
  const int count = level.rows * level.topk;
  const int32_t first = level.first;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    add_candidate(pool, level, i);
    entries[i] = entry_of(pool.scores[first + i], i);
  }
  __syncthreads();
  const bool few = count <= kMostRanked;
  if (!few) {
    block_select_largest<kThreads>(
        select, count, level.topk, [&](int i) { return static_cast<uint32_t>(entries[i] >> 32); },
        [&](int place, int i) { kept[place] = entries[i]; });
  }
  place_largest<kThreads>(
      few ? entries : kept, few ? count : level.topk, level.topk,
      [&](int place, uint64_t entry) { pool.beam[place] = first + entry_index(entry); });
  __syncthreads();
  for (int j = threadIdx.x; j < level.topk; j += kThreads) write_beam_row(pool, level, j);
}

// Keeps the tree.nodes - 1 best candidates of the pool, in ascending order, and writes the tree.
__global__ void __launch_bounds__(kThreads, 1)
    build_tree_kernel(const DraftTree tree, const DraftPool pool, const TreeRoot root) {
  SHARED(SelectScratch<kThreads>, select);
  SHARED(int32_t, kept, [kMaxTreeNodes]);
  dependency_launch();
  dependency_wait();
  const int drafted = tree.nodes - 1;
  block_select_largest<kThreads>(
      select, static_cast<int>(pool.capacity), drafted,
      [&](int i) { return order_key(pool.scores[i]); }, [&](int place, int i) { kept[place] = i; });
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < drafted) {
    const int32_t own = kept[threadIdx.x];
    int place = 0;
    for (int j = 0; j < drafted; ++j) place += kept[j] < own ? 1 : 0;
    tree.selected[1 + place] = own;
  }
  __syncthreads();
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads) {
    write_tree_node(tree, pool, root, node);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    build_static_tree_kernel(const DraftTree tree, const StaticTree shape, const int32_t* tokens,
                             const TreeRoot root) {
  dependency_launch();
  dependency_wait();
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads) {
    write_static_node(tree, shape, tokens, root, node);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    walk_tree_kernel(const TreeWalk walk, const DraftTree tree, const int32_t* chosen) {
  SHARED(int32_t, next, [kMaxTreeNodes]);
  dependency_launch();
  dependency_wait();
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads) next[node] = kMaxTreeNodes;
  __syncthreads();
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads) {
    if (continues_parent(tree, chosen, node)) atomicMin(&next[tree.parents[node]], node);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    follow_path(walk, chosen, [&](int32_t node) {
      return next[node] < kMaxTreeNodes ? next[node] : int32_t{-1};
    });
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    plant_tree_kernel(const DraftTree tree, const Plant* of_request) {
  dependency_launch();
  dependency_wait();
  const Plant plant = *of_request;
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads) {
    plant_node(tree, plant, node);
  }
  __syncthreads();
  for (int32_t node = threadIdx.x; node < tree.nodes; node += kThreads)
    relink_node(tree, plant, node);
}

// Pieces of 16 bytes that a thread moves: of a path of at most kMaxTreeDepth + 1 rows of
// kMaxHeadDim elements.
constexpr int kMoves = ((kMaxTreeDepth + 1) * kMaxHeadDim / 8 + kThreads - 1) / kThreads;

// grid: (layers, heads, keys or values). Slot base + j takes the row of slot base + path[j]; all
// are read before one is written.
__global__ void __launch_bounds__(kThreads, 1)
    commit_kv_kernel(uint4* keys, uint4* values, int64_t layer_stride, int64_t head_stride,
                     int row_pieces, const int32_t* base, const int32_t* path,
                     const int32_t* path_length) {
  dependency_launch();
  dependency_wait();
  uint4* rows = (blockIdx.z == 0 ? keys : values) + blockIdx.x * layer_stride +
                blockIdx.y * head_stride + static_cast<int64_t>(*base) * row_pieces;
  const int pieces = *path_length * row_pieces;
  uint4 moved[kMoves];
#pragma unroll
  for (int m = 0; m < kMoves; ++m) {
    const int i = m * kThreads + threadIdx.x;
    if (i < pieces) moved[m] = rows[path[i / row_pieces] * row_pieces + i % row_pieces];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kMoves; ++m) {
    const int i = m * kThreads + threadIdx.x;
    if (i < pieces && path[i / row_pieces] != i / row_pieces) rows[i] = moved[m];
  }
}

}  // namespace

void expand_beam(const DraftPool& pool, const DraftLevel& level, cudaStream_t stream) {
  FRSPEC_CHECK(level.topk >= 1 && level.topk <= kMaxTreeTopK, Error, "expand_beam: topk is ",
               level.topk, ", expected 1 to ", kMaxTreeTopK);
  launch<expand_beam_kernel>({dim3(1), dim3(kThreads), stream}, "expand_beam", pool, level);
}

void build_tree(const DraftTree& tree, const DraftPool& pool, const TreeRoot& root,
                cudaStream_t stream) {
  FRSPEC_CHECK(tree.nodes >= 1 && tree.nodes <= kMaxTreeNodes && tree.nodes - 1 <= pool.capacity,
               Error, "build_tree: ", tree.nodes, " nodes from ", pool.capacity,
               " candidates, at most ", kMaxTreeNodes, " are possible");
  launch<build_tree_kernel>({dim3(1), dim3(kThreads), stream}, "build_tree", tree, pool, root);
}

void build_static_tree(const DraftTree& tree, const StaticTree& shape, const int32_t* tokens,
                       const TreeRoot& root, cudaStream_t stream) {
  FRSPEC_CHECK(tree.nodes >= 1 && tree.nodes <= kMaxTreeNodes, Error,
               "build_static_tree: ", tree.nodes, " nodes, at most ", kMaxTreeNodes,
               " are possible");
  launch<build_static_tree_kernel>({dim3(1), dim3(kThreads), stream}, "build_static_tree", tree,
                                   shape, tokens, root);
}

void walk_tree(const TreeWalk& walk, const DraftTree& tree, const int32_t* chosen,
               cudaStream_t stream) {
  FRSPEC_CHECK(tree.nodes >= 1 && tree.nodes <= kMaxTreeNodes, Error, "walk_tree: ", tree.nodes,
               " nodes, at most ", kMaxTreeNodes, " are possible");
  launch<walk_tree_kernel>({dim3(1), dim3(kThreads), stream}, "walk_tree", walk, tree, chosen);
}

void plant_tree(const DraftTree& tree, const Plant* plant, cudaStream_t stream) {
  launch<plant_tree_kernel>({dim3(1), dim3(kThreads), stream}, "plant_tree", tree, plant);
}

void commit_kv(const KvLayer* layers, int64_t layer_count, const int32_t* base, const int32_t* path,
               const int32_t* path_length, cudaStream_t stream) {
  if (layer_count == 0) return;
  const KvLayer& first = layers[0];
  const int64_t bytes = static_cast<int64_t>(dtype_size(first.dtype));
  int64_t stride = 0;  // bytes between layers, the same everywhere
  if (layer_count > 1) {
    stride = static_cast<char*>(layers[1].keys) - static_cast<char*>(first.keys);
  }
  for (int64_t l = 0; l < layer_count; ++l) {
    FRSPEC_CHECK(
        static_cast<char*>(layers[l].keys) == static_cast<char*>(first.keys) + l * stride &&
            static_cast<char*>(layers[l].values) == static_cast<char*>(first.values) + l * stride,
        Error, "commit_kv: layer ", l, " of the cache is not where its number puts it");
  }
  FRSPEC_CHECK(
      first.head_dim <= kMaxHeadDim && first.head_dim * bytes % 16 == 0 && stride % 16 == 0, Error,
      "commit_kv: head_dim ", first.head_dim, ", expected at most ", kMaxHeadDim);
  launch<commit_kv_kernel>(
      {dim3(static_cast<unsigned>(layer_count), static_cast<unsigned>(first.heads), 2),
       dim3(kThreads), stream},
      "commit_kv", static_cast<uint4*>(first.keys), static_cast<uint4*>(first.values), stride / 16,
      first.slots * first.head_dim * bytes / 16, static_cast<int>(first.head_dim * bytes / 16),
      base, path, path_length);
}

}  // namespace frspec::cuda
