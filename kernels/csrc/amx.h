// Intel AMX: may this process use it, and a thread's tile configuration. Tile instructions themselves are in the files
// that are built with them.
#pragma once

#include <cstdint>
#if defined(__linux__) && defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Asks the kernel once per process for the tile registers, which it grants where the machine has them; threads follow.
inline bool may_use_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                              __builtin_cpu_supports("amx-int8") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

#if defined(__AMX_TILE__)
// The intrinsics of GCC do not say that tile loads read memory: without this, stores could move behind them.
inline void finish_stores() { asm volatile("" ::: "memory"); }

struct TileShape {
  uint8_t rows;            // at most 16
  uint16_t bytes_per_row;  // at most 64
};

// Shapes the eight tile registers of this thread, until _tile_release(): to be called before others compute in this
// thread (oneDNN brings a configuration of its own). Not an object with a destructor: that would need exceptions.
inline void configure_tiles(const TileShape (&shapes)[8]) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = shapes[i].bytes_per_row;
    config.rows[i] = shapes[i].rows;
  }
  finish_stores();
  _tile_loadconfig(&config);
}

// As instructions: g++ takes numbers of tiles from the source text alone, not from a template.
template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
#endif

}  // namespace
