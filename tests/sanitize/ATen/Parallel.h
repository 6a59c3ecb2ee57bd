// In the place of torch's header of this name: the same parts, each by a std::thread, whose beginning and end
// ThreadSanitizer sees (of OpenMP's it sees nothing, and takes every hand-over for a race).
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace at {

inline int threads = 1;
inline thread_local bool in_part = false;

inline int get_num_threads() {
  return threads;
}

// A part of a part is not shared out again.
template <class F>
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const F& f) {
  if (begin >= end) return;
  const auto divide = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t parts = in_part ? 1 : std::min<std::int64_t>(threads, divide(end - begin, grain));
  const std::int64_t size = divide(end - begin, parts);
  const auto part = [&](std::int64_t at) {
    const bool before = std::exchange(in_part, true);
    f(at, std::min(at + size, end));
    in_part = before;
  };
  std::vector<std::thread> others;
  for (std::int64_t at = begin + size; at < end; at += size) others.emplace_back(part, at);
  part(begin);
  for (std::thread& other : others) other.join();
}

}  // namespace at
