// A job is a number of grains that threads take from a counter. The caller takes some too and waits for grains, never
// for threads: a worker that the system does not run holds nothing up unless it was stopped amid its grains.
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace pagestream {
namespace {

using Clock = std::chrono::steady_clock;

// After this long without work a worker sleeps: more than the gap between two operators of a step, less than anyone's
// notice. Waking one takes some 50 us and a system call of the caller.
constexpr auto kSpin = std::chrono::microseconds(200);
// After this long the caller offers its core: the thread that it waits for may be queued behind it.
constexpr auto kPatience = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Whether `ready` became true within `limit`, more or less: the first look at the clock is late.
template <typename Ready>
bool spin_until(const Ready& ready, Clock::duration limit) {
  constexpr int kChecksPerLook = 64;
  for (Clock::time_point end{};;) {
    for (int i = 0; i < kChecksPerLook; ++i) {
      if (ready()) return true;
      pause();
    }
    const Clock::time_point now = Clock::now();
    if (end == Clock::time_point{}) end = now + limit;
    if (now >= end) return false;
  }
}

class ThreadPool {
 public:
  void run(int64_t grains, int64_t count, int64_t grain, int64_t threads, Body body, const void* context) {
    grow(threads - 1);
    count_ = count;
    grain_ = grain;
    grains_ = grains;
    body_ = body;
    context_ = context;
    helpers_.store(threads - 1, std::memory_order_relaxed);
    unfinished_.store(grains, std::memory_order_relaxed);
    untaken_.store(grains);  // publishes all of the above to whoever takes some
    if (asleep_.load() > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);  // no worker is between its last look and its sleep
      wake_.notify_all();
    }
    while (take_some()) {
    }
    const auto is_done = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(is_done, kPatience)) sched_yield();
  }

  std::atomic_flag in_use = ATOMIC_FLAG_INIT;

 private:
  bool has_work() const { return untaken_.load(std::memory_order_relaxed) > 0; }

  // An equal part of half of what is left, so that the last ones are small. What is taken keeps its job in place, so
  // the job is read only afterwards.
  bool take_some() {
    int64_t left = untaken_.load(std::memory_order_relaxed), taken;
    do {
      if (left <= 0) return false;
      taken = std::max(int64_t{1}, left / (2 * (helpers_.load(std::memory_order_relaxed) + 1)));
    } while (!untaken_.compare_exchange_weak(left, left - taken, std::memory_order_acq_rel, std::memory_order_relaxed));
    const int64_t begin = (grains_ - left) * grain_;
    body_(context_, begin, std::min(begin + taken * grain_, count_));
    unfinished_.fetch_sub(taken, std::memory_order_release);
    return true;
  }

  void grow(int64_t workers) {
    for (; workers_ < workers; ++workers_) {
      try {
        std::thread(&ThreadPool::work, this, workers_).detach();
      } catch (const std::system_error&) {
        return;  // the caller does the work
      }
    }
  }

  void work(int64_t index) {
    const auto is_wanted = [this, index] {
      return has_work() && index < helpers_.load(std::memory_order_relaxed);
    };
    for (;;) {
      if (spin_until(is_wanted, kSpin)) {
        take_some();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);  // before the last look: run() publishes work, then reads it
      if (untaken_.load() <= 0) wake_.wait(lock);
      asleep_.fetch_sub(1);
    }
  }

  int64_t count_ = 0, grain_ = 0, grains_ = 0, workers_ = 0;
  Body body_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> untaken_{0};
  std::atomic<int64_t> helpers_{0};  // workers that this job may use
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<int64_t> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its workers end with the process. A fork takes no threads along, so a child gets a pool of its own.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  static_cast<void>(registered);
  ThreadPool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  auto* made = new ThreadPool;
  if (pool.compare_exchange_strong(current, made)) return *made;
  delete made;  // another thread was first
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int64_t threads, Body body, const void* context) {
  const int64_t grains = (count + grain - 1) / grain, most = std::min(grains, threads);
  if (most > 1) {
    ThreadPool& shared = the_pool();
    if (!shared.in_use.test_and_set(std::memory_order_acquire)) {
      shared.run(grains, count, grain, most, body, context);
      shared.in_use.clear(std::memory_order_release);
      return;
    }
  }
  if (count > 0) body(context, 0, count);
}

}  // namespace pagestream
