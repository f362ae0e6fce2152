// Fibres and their scheduler; see machine.h. x86-64 only: a fibre switch is eight instructions of its assembly.
#include <machine.h>
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

// Saves the callee-saved registers on this stack, its pointer in *from, and goes on where `to` was saved.
extern "C" void switch_stack(void** from, void* to);
asm(R"(
.globl switch_stack
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace pagestream::gpu {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kCopyBytes = 16;

enum class Stop { kStart, kWarpOperation, kBlockBarrier, kEnd };

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
};

// Stacks outlive their fibres: making them is slower than what most blocks do.
unsigned char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new unsigned char[kStackBytes]);
  return stacks[thread].get();
}

struct Fibre {
  void* stack_pointer = nullptr;
  Stop stop = Stop::kStart;
  WarpOperation operation = nullptr;
  void* lane = nullptr;
  std::vector<Copy> open;                 // not yet in a group
  std::vector<std::vector<Copy>> groups;  // not yet waited for, oldest first
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "host_gpu: %s\n", what);
  std::exit(3);
}

class Block {
 public:
  Block(int index, int num_threads, size_t shared_bytes, std::mt19937& random, const Kernel& kernel)
      : index_(index), fibres_(num_threads), random_(random), kernel_(kernel) {
    shared_ = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    std::memset(shared_, 0xff, shared_bytes);  // NaN in every type
  }
  ~Block() { std::free(shared_); }

  void run() {
    for (size_t i = 0; i < fibres_.size(); ++i) prepare(fibres_[i], stack_of(i));
    const int num_warps = static_cast<int>(fibres_.size()) / kWarpSize;
    std::vector<int> order(num_warps);
    std::iota(order.begin(), order.end(), 0);
    while (!all_at(Stop::kEnd)) {
      std::shuffle(order.begin(), order.end(), random_);
      for (const int warp : order) run_warp(warp);
      if (all_at(Stop::kBlockBarrier))
        for (Fibre& fibre : fibres_) fibre.stop = Stop::kStart;
      else if (any_at(Stop::kBlockBarrier))
        fail("some threads wait at a barrier that others never reach");
    }
  }

  void stop(Stop why) {
    running_->stop = why;
    switch_stack(&running_->stack_pointer, scheduler_);
  }

  static void enter();

  const int index_;
  std::vector<Fibre> fibres_;
  Fibre* running_ = nullptr;
  std::mt19937& random_;

 private:
  static void prepare(Fibre& fibre, unsigned char* stack) {
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // the last user never returned from enter()
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) / 16 * 16 - 8;  // as after a call
    auto** frame = reinterpret_cast<void**>(top) - 7;  // six registers, then the return
    std::memset(frame, 0, 7 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(&Block::enter);
    fibre.stack_pointer = frame;
  }

  // Runs the lanes of a warp from meeting to meeting until all stand at a block barrier or have ended.
  void run_warp(int warp) {
    Fibre* lanes = &fibres_[warp * kWarpSize];
    while (lanes[0].stop == Stop::kStart || lanes[0].stop == Stop::kWarpOperation) {
      const int rotation = static_cast<int>(random_() % kWarpSize);
      for (int i = 0; i < kWarpSize; ++i) {
        running_ = &lanes[i ^ rotation];
        switch_stack(&scheduler_, running_->stack_pointer);
      }
      for (int i = 1; i < kWarpSize; ++i)
        if (lanes[i].stop != lanes[0].stop || lanes[i].operation != lanes[0].operation) fail("lanes of a warp diverge");
      if (lanes[0].stop != Stop::kWarpOperation) return;
      void* arguments[kWarpSize];
      for (int i = 0; i < kWarpSize; ++i) arguments[i] = lanes[i].lane;
      lanes[0].operation(arguments);
    }
  }

  bool any_at(Stop stop) const {
    return std::any_of(fibres_.begin(), fibres_.end(), [stop](const Fibre& f) { return f.stop == stop; });
  }
  bool all_at(Stop stop) const {
    return std::all_of(fibres_.begin(), fibres_.end(), [stop](const Fibre& f) { return f.stop == stop; });
  }

  unsigned char* shared_;
  void* scheduler_ = nullptr;
  const Kernel& kernel_;
};

Block* block = nullptr;  // the one that runs

void Block::enter() {
  block->kernel_(block->shared_);
  block->stop(Stop::kEnd);
}

void land(const Copy& copy) {
  if (copy.from == nullptr) std::memset(copy.to, 0, kCopyBytes);
  else std::memcpy(copy.to, copy.from, kCopyBytes);
}

}  // namespace

void launch(int num_blocks, int num_threads, size_t shared_bytes, uint32_t seed, const Kernel& kernel) {
  std::mt19937 random(seed);
  std::vector<int> order(num_blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int index : order) {
    Block running(index, num_threads, shared_bytes, random, kernel);
    block = &running;
    running.run();
  }
}

int thread_index() { return static_cast<int>(block->running_ - block->fibres_.data()); }
int block_index() { return block->index_; }
void block_barrier() { block->stop(Stop::kBlockBarrier); }

void meet(WarpOperation operation, void* lane) {
  block->running_->operation = operation;
  block->running_->lane = lane;
  block->stop(Stop::kWarpOperation);
}

void copy_async(void* shared, const void* global, bool valid) {
  const auto from = reinterpret_cast<uintptr_t>(valid ? global : shared), to = reinterpret_cast<uintptr_t>(shared);
  if (from % kCopyBytes != 0 || to % kCopyBytes != 0)
    fail("copy not aligned to 16 bytes");
  const Copy copy{static_cast<unsigned char*>(shared), valid ? static_cast<const unsigned char*>(global) : nullptr};
  if (block->random_() % 2 == 0) return land(copy);
  std::memset(shared, 0xff, kCopyBytes);
  block->running_->open.push_back(copy);
}

void commit_copies() {
  block->running_->groups.push_back(std::move(block->running_->open));
  block->running_->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = block->running_->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace pagestream::gpu
