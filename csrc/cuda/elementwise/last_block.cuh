// Sums over blocks that end in the kernel that begins them: no second launch.
//
// Blocks that share the rows of some channels, a group, leave partial results in memory. The last
// of them to do so adds all of them up. Who is last, tickets tell: a counter that every block moves
// by one. What is added, and in which order, does not depend on it, so the same input gives the
// same bits.
//
//   partial results [blocks, channels]    team t: those of blocks t, t + teams, t + 2 teams, ...
//
//   team 0: block 0, teams, 2 teams, ...      --ticket-->  last one: their sum  \\
//   team 1: block 1, teams + 1, ...           --ticket-->  last one: likewise    >  --ticket-->
//   ...                                                                         /   last one of
//   all:
//                                                                                   the teams' sum
//
// One block alone would have to read hundreds of numbers per channel, one after the other. So there
// are as many teams as a team has members, or a single one where the numbers are few. In a warp
// several lanes share the numbers of a channel, where there are fewer channels than threads.
//
// Memory order. A block's threads write their partial results. __syncthreads orders these before
// what its first thread does next: it takes a ticket, which releases them to the device and
// acquires what earlier tickets released. So who finds itself last sees the others' results, and
// the barrier behind hands this on to its other threads. The reads are plain loads: no thread has
// read these addresses before in this kernel.
//
// Tickets are 0 before a kernel and again behind it: who is last sets them back, and nobody else
// looks at them any more. They belong to one call of an operator (KernelArgs::tickets), so streams
// cannot meet in them, a CUDA graph has its own, and a kernel that was aborted leaves nothing.
#pragma once

#include "cuda/elementwise/tile.cuh"

namespace efficient_densenet::cuda {

// Two numbers.
struct Pair {
  double first, second;

  __device__ void add(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

// What is added up in one step: partial results first, first + step, ... < end of the blocks, or
// of the teams, which lie behind those of `base` blocks.
struct Members {
  int first, step, end, base;
};

// Two numbers per channel and block: they are few, and sums in double then add no error of their
// own. [blocks + teams, channels] each; those of the teams lie behind those of the blocks.
struct Partials {
  double *first, *second;
  int64_t channels;
  int blocks, teams;  // of a group
  uint32_t* tickets;  // [groups, group_tickets(teams)]

  // Of groups of so many channels, where one block adds up `most` pairs without teams.
  static int teams_of(int64_t blocks, int64_t channels, int64_t most = 8192) {
    if (blocks * channels <= most) return 1;
    int teams = 1;
    while (teams * teams < blocks) ++teams;
    return teams;
  }
  // One per team, where there are several, and one of the group.
  __host__ __device__ static int group_tickets(int teams) { return teams > 1 ? teams + 1 : 1; }

  __device__ int64_t at(int block, int64_t channel) const { return block * channels + channel; }
  __device__ Pair load(int block, int64_t channel) const {
    return {first[at(block, channel)], second[at(block, channel)]};
  }
  __device__ Members last_step() const {
    return teams > 1 ? Members{0, 1, teams, blocks} : Members{0, 1, blocks, 0};
  }
  __device__ void store(int block, int64_t channel, const Pair& pair) const {
    first[at(block, channel)] = pair.first;
    second[at(block, channel)] = pair.second;
  }
};

// Lanes of a warp that share a channel, and which of them the thread is.
struct Sharing {
  int lanes, own;

  // The sum of term(i, load(i)) over the members, in all of these lanes.
  template <typename Load, typename Term>
  __device__ Pair sum(const Members& members, const Load& load, const Term& term) const {
    constexpr int kAtOnce = 8;  // loads; the compiler would wait for one before the next
    const int apart = lanes * members.step;
    Pair sum{};
    for (int first = members.first + own * members.step; first < members.end;
         first += kAtOnce * apart) {
      Pair pairs[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        pairs[k] = load(min(first + k * apart, members.end - 1));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = first + k * apart;
        if (i < members.end) sum.add(term(i, pairs[k]));
      }
    }
    for (int bit = kWarp / 2; bit >= kWarp / lanes; bit /= 2) {
      sum.add({__shfl_xor_sync(~0u, sum.first, bit), __shfl_xor_sync(~0u, sum.second, bit)});
    }
    return sum;
  }
};

// The ticket's value before; as memory order above. Full fences around a relaxed addition, which
// older devices need, are slower.
__device__ inline uint32_t take_ticket(uint32_t* ticket) {
#if __CUDA_ARCH__ >= 700
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
#else
  __threadfence();
  const uint32_t before = atomicAdd(ticket, 1u);
  __threadfence();
#endif
  return before;
}

// Whether the block is the last of `blocks` to take this ticket. It then sees what they wrote.
// Its threads learn it from the barrier, since kernels that multiply have no shared memory left.
__device__ inline bool is_last_block(uint32_t* ticket, int blocks) {
  bool is_last = false;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    is_last = take_ticket(ticket) == static_cast<uint32_t>(blocks - 1);
    if (is_last) *ticket = 0;
  }
  return __syncthreads_or(is_last);
}

// Calls body(c, sharing) for the channels in [begin, end), by whole warps: lanes whose channel does
// not exist take part with the last one.
template <typename Body>
__device__ void for_shared_channels(int64_t begin, int64_t end, const Body& body) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warps = blockDim.x * blockDim.y / kWarp, lane = thread % kWarp;
  if (thread / kWarp >= warps) return;
  int lanes = kWarp;
  while (lanes > 1 && (end - begin) * lanes > warps * kWarp) lanes /= 2;
  const int apart = kWarp / lanes;  // channels of a warp
  const Sharing sharing{lanes, lane / apart};
  for (int64_t c = begin + thread / kWarp * apart; c < end; c += warps * apart) {
    body(min(c + lane % apart, end - 1), sharing);
  }
}

// Adds up the partial results of a group's channels in its last block. All threads of all of its
// blocks call this, after they have written theirs. `sums` is a type of operation:
//   sums.add(partials, members, sharing, channel)     the Pair of a step
//   sums.finish(pair, channel)                        what follows from all of them
// With `leaves`, the last step is left to others: the numbers are those of the teams, or of the
// blocks where there is one team alone.
template <typename Operation>
__device__ void add_in_last_block(const Partials& partials, int group, int block, int64_t begin,
                                  int64_t end, const Operation& sums, bool leaves = false) {
  if (leaves && partials.teams == 1) return;
  const int blocks = partials.blocks, teams = partials.teams;
  uint32_t* const tickets = partials.tickets + group * Partials::group_tickets(teams);
  if (teams > 1) {
    const int team = block % teams;
    if (!is_last_block(tickets + team, (blocks - team + teams - 1) / teams)) return;
    const Members members{team, teams, blocks, 0};
    for_shared_channels(begin, end, [&](int64_t c, const Sharing& sharing) {
      const Pair pair = sums.add(partials, members, sharing, c);
      if (sharing.own == 0) partials.store(blocks + team, c, pair);
    });
    if (leaves || !is_last_block(tickets + teams, teams)) return;
  } else if (!is_last_block(tickets, blocks)) {
    return;
  }
  const Members members = partials.last_step();
  for_shared_channels(begin, end, [&](int64_t c, const Sharing& sharing) {
    const Pair pair = sums.add(partials, members, sharing, c);
    if (sharing.own == 0) sums.finish(pair, c);
  });
}

}  // namespace efficient_densenet::cuda
