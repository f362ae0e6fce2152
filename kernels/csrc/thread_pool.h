// The threads that share the work of one operator: the caller and workers that live as long as the process. Torch's own
// pool waits for every thread at the end of every loop, so one core taken by another process stalls them all.
#pragma once

#include <cstdint>

namespace pagestream {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body for ranges [begin, end) that cover [0, count) once, on at most `threads` threads, and returns when all are
// done. Ranges start at multiples of `grain`, the least that is worth handing out; they are large at first and smaller
// towards the end, and who is late gets fewer. Where they begin and who runs them is chance, so results may not depend
// on it. A call while another one runs, from inside it or from another thread, has no workers. The body may not throw.
void parallel_for(int64_t count, int64_t grain, int64_t threads, Body body, const void* context);

template <typename F>
void parallel_for(int64_t count, int64_t grain, int64_t threads, const F& body) {
  parallel_for(
      count, grain, threads,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &body);
}

}  // namespace pagestream
