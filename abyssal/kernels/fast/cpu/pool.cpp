#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace abyssal {
namespace {

constexpr int most_threads = 256;
// How long an idle thread looks for work before it sleeps: longer than the pauses between the kernels of one
// token, shorter than what would take a core from torch's own threads for long.
constexpr auto patience = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    return count < most_threads ? count : most_threads;
  }
#endif
  const int count = static_cast<int>(std::thread::hardware_concurrency());
  return count < 1 ? 1 : count < most_threads ? count : most_threads;
}

struct alignas(64) Share {
  std::atomic<std::int64_t> next{0};
  std::int64_t stop = 0;
};

// `state` says whether a job is open and how many helpers are inside: CLOSED, or their number.
constexpr int closed = 1 << 30;

class Pool {
 public:
  void run(std::int64_t tasks, Task task, void* context, int wanted) {
    int members = wanted > 0 ? wanted : limit_.load(std::memory_order_relaxed);
    if (members > tasks) members = static_cast<int>(tasks);
    if (members > most_threads) members = most_threads;
    if (members <= 1 || !busy_.try_lock()) {
      for (std::int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    start(members - 1);
    task_ = task;
    context_ = context;
    members_ = members;
    for (int m = 0; m < members; ++m) {
      shares_[m].stop = tasks * (m + 1) / members;
      shares_[m].next.store(tasks * m / members, std::memory_order_relaxed);
    }
    state_.store(0, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { const std::lock_guard<std::mutex> hold(sleep_); }
      wake_.notify_all();
    }
    work(0);
    // close the door, then wait for those who are inside
    int inside = state_.fetch_or(closed, std::memory_order_acq_rel);
    for (int turn = 0; inside != 0; inside = state_.load(std::memory_order_acquire) & ~closed) {
      if (++turn < 10000) pause();
      else std::this_thread::yield();
    }
    busy_.unlock();
  }

  int limit() const { return limit_.load(std::memory_order_relaxed); }
  void set_limit(int count) { limit_.store(count < 1 ? 1 : count, std::memory_order_relaxed); }

 private:
  void start(int helpers) {
    while (static_cast<int>(started_) < helpers) {
      const int number = static_cast<int>(++started_);
      std::thread([this, number] { live(number); }).detach();
    }
  }

  void work(int member) {
    const int members = members_;
    for (int turn = 0; turn < members; ++turn) {
      Share& share = shares_[(member + turn) % members];
      while (share.next.load(std::memory_order_relaxed) < share.stop) {
        const std::int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= share.stop) break;
        task_(context_, i);
      }
    }
  }

  void live(int number) {
    std::uint64_t seen = 0;
    for (;;) {
      seen = next_generation(seen);
      int inside = state_.load(std::memory_order_acquire);
      // enter unless the door is closed
      while ((inside & closed) == 0)
        if (state_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) {
          if (number < members_) work(number);
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
    }
  }

  std::uint64_t next_generation(std::uint64_t seen) {
    const auto give_up = std::chrono::steady_clock::now() + patience;
    for (int turn = 1;; ++turn) {
      const std::uint64_t now = generation_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
      if (turn % 64 == 0 && std::chrono::steady_clock::now() > give_up) break;
    }
    std::unique_lock<std::mutex> hold(sleep_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(hold, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return generation_.load(std::memory_order_acquire);
  }

  std::mutex busy_;  // held by the caller whose job runs
  std::atomic<int> limit_{processors()};
  std::size_t started_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int members_ = 0;
  Share shares_[most_threads];
  alignas(64) std::atomic<int> state_{closed};
  alignas(64) std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// never destroyed: its threads may outlive main
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

void run(std::int64_t tasks, Task task, void* context, int wanted) { pool().run(tasks, task, context, wanted); }
int threads() { return pool().limit(); }
void set_threads(int count) { pool().set_limit(count); }

}  // namespace abyssal
