// ldmatrix: csrc/cuda/ptx.h.
#include <algorithm>
#include <cstdint>

#include "hooks.h"
#include "warp.h"

namespace cusim {
namespace {

uint64_t matrices, wavefronts;

// Eight rows of 16 bytes take as many wavefronts as fall into the same four banks.
void count(const void* const (&rows)[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned rows_in[8] = {}, most = 0;
    for (int i = 0; i < 8; ++i) {
      const auto address = reinterpret_cast<uintptr_t>(rows[matrix * 8 + i]);
      most = std::max(most, ++rows_in[address / 16 % 8]);
    }
    ++matrices;
    wavefronts += most;
  }
}

}  // namespace

void ldmatrix(unsigned (&result)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
  const void* code = __builtin_return_address(0);
  const void* rows[32];
  std::memcpy(rows, warp_gather(0xffffffffu, op_ldmatrix, &row, sizeof row, transposed),
              sizeof rows);
  warp_release();
  const unsigned lane = cur->lane, major = lane / 4, minor = lane % 4 * 2;
  if (lane == 0) count(rows);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    result[matrix] = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned line = transposed ? minor + i : major, column = transposed ? major : minor + i;
      const auto* from = static_cast<const uint16_t*>(rows[matrix * 8 + line]) + column;
      // A matrix's elements are read by the lanes that get them.
      if (cucheck_read) cucheck_read(from, sizeof *from, code);
      result[matrix] |= static_cast<unsigned>(*from) << (16 * i);
    }
  }
}

}  // namespace cusim

extern "C" __attribute__((visibility("default"))) void cusim_ldmatrix_counts(uint64_t (&out)[2]) {
  out[0] = std::exchange(cusim::matrices, 0);
  out[1] = std::exchange(cusim::wavefronts, 0);
}
