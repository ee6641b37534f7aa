// cp.async for cusim: per-thread queues of pending copies; cucheck sees the read at issue and the write at the wait
#include <cstring>
#include <deque>
#include <vector>
#include <map>
#include <cstdint>
extern "C" { __attribute__((weak)) void __tsan_read_range(void*, size_t); __attribute__((weak)) void __tsan_write_range(void*, size_t);
void cusim_who(unsigned*, unsigned*, unsigned*, char**, size_t*); }
namespace cusim {
void fail(const char*, ...);
struct Op { void* s; unsigned bytes; unsigned char v[16]; };
struct Q { std::vector<Op> cur; std::deque<std::vector<Op>> done; };
static Q q[1024];
static Q& me() { unsigned t, l, w; char* s; size_t n; cusim_who(&t, &l, &w, &s, &n); return q[t]; }
static void reads(const void* p, unsigned n) { if (__tsan_read_range) __tsan_read_range((void*)p, n); }
static void writes(void* p, unsigned n) { if (__tsan_write_range) __tsan_write_range(p, n); }
void cp_async(void* s, const void* g, unsigned n, bool ok) {
  if (n != 4 && n != 8 && n != 16) fail("cp.async of %u bytes", n);
  if ((uintptr_t)s % n || (ok && (uintptr_t)g % n)) fail("cp.async address not aligned to its %u bytes", n);
  Op o; o.s = s; o.bytes = n;
  if (ok) { reads(g, n); memcpy(o.v, g, n); } else memset(o.v, 0, n);
  writes(s, n); memset(s, 0xff, n);  // the destination is undefined from the issue to the wait
  me().cur.push_back(o);
}
void cp_commit() { Q& x = me(); x.done.push_back(std::move(x.cur)); x.cur.clear(); }
void cp_wait(int left) {
  Q& x = me();
  while ((int)x.done.size() > left) {
    for (Op& o : x.done.front()) { writes(o.s, o.bytes); memcpy(o.s, o.v, o.bytes); }
    x.done.pop_front();
  }
}
}  // namespace cusim
