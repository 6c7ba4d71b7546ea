// One way to report a wrong argument: operator, argument, what was expected, what came.
#pragma once

#include <sstream>
#include <stdexcept>

namespace efficient_densenet {

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace efficient_densenet

#define EFFICIENT_DENSENET_CHECK(condition, ...)               \
  do {                                                         \
    if (!(condition)) ::efficient_densenet::fail(__VA_ARGS__); \
  } while (false)
