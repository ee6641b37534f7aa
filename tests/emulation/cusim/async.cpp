// Copies to shared memory in the background. A thread's copy reads its source when it is issued,
// leaves its destination undefined from then on, and writes it at the wait; the checker sees all
// three.
#include <cstdint>
#include <deque>
#include <vector>

#include "hooks.h"

namespace cusim {
namespace {

struct Copy {
  void* to;
  unsigned bytes;
  unsigned char value[16];
};
struct Copies {
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> groups;
};
Copies copies[1024];

Copies& mine() { return copies[cur->linear]; }

}  // namespace

void reset_copies() {
  for (Copies& each : copies) {
    each.issued.clear();
    each.groups.clear();
  }
}

void cp_async(void* to, const void* from, unsigned bytes, bool take) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes", bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("cp.async from %p to %p: not aligned to its %u bytes", from, to, bytes);
  }
  const void* code = __builtin_return_address(0);
  Copy copy{to, bytes, {}};
  if (take) {
    if (cucheck_read) cucheck_read(from, bytes, code);
    memcpy(copy.value, from, bytes);
  }
  if (cucheck_copy_issued) cucheck_copy_issued(to, bytes, code);
  memset(to, 0xff, bytes);
  mine().issued.push_back(copy);
}

void cp_commit() {
  mine().groups.push_back(std::move(mine().issued));
  mine().issued.clear();
}

void cp_wait(int left) {
  const void* code = __builtin_return_address(0);
  auto& groups = mine().groups;
  while (groups.size() > static_cast<size_t>(left)) {
    for (const Copy& copy : groups.front()) {
      if (cucheck_copy_landed) cucheck_copy_landed(copy.to, copy.bytes, code);
      memcpy(copy.to, copy.value, copy.bytes);
    }
    groups.pop_front();
  }
}

}  // namespace cusim
