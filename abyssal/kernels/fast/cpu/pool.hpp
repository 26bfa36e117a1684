// One pool of threads for all kernels.
//
// A job is a number of tasks. Each thread begins with a share of neighbouring tasks, the same share in every job
// of the same size, so that it finds its part of the weights in its cache; who is done early takes from others.
// The caller works too and never waits for a thread that has not begun, so a job on a busy machine, or in a
// process that was forked and has no other threads, just takes longer.
//
// Which thread computes a task must not change its result.
#pragma once

#include <cstdint>

namespace abyssal {

using Task = void (*)(void* context, std::int64_t task);

// Call task(context, i) for every i below `tasks`, on at most `threads` threads (0: as many as there are).
// A job that is started while another one runs, or inside a task, runs on its caller alone.
void run(std::int64_t tasks, Task task, void* context, int threads = 0);

// The most threads that a job uses, its caller among them; by default the processors that this process may use.
int threads();
void set_threads(int count);

}  // namespace abyssal
