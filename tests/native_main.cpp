// Runs native.cpp (included by the compiler's option) on a file, for a CPU that is emulated: a Call whose addresses are
// offsets into the file, then its tensors; what it computes is written back.
#include <fstream>
#include <iterator>
#include <string>

int main(int, char** arguments) {
  std::fstream file(arguments[1], std::ios::in | std::ios::out | std::ios::binary);
  std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  Call& call = *(Call*)bytes.data();
  auto move = [&](auto*&... addresses) {
    ((addresses = addresses ? (std::remove_reference_t<decltype(addresses)>)(bytes.data() + (size_t)addresses) : nullptr), ...);
  };
  move(call.q.data, call.k.data, call.v.data, call.out.data, call.grad.data, call.dq.data, call.dk.data, call.dv.data);
  move(call.lse, call.dlse, call.lo, call.hi);
  const std::string direction = arguments[2];
  const int failed = direction == "forward" ? forward(&call) : direction == "decode" ? decode(&call) : backward(&call);
  file.clear();
  file.seekp(0);
  file.write(bytes.data(), bytes.size());
  return failed || !file;
}
