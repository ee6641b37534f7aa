#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(FASTFISHER_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastfisher::cpu {
namespace {

#if defined(FASTFISHER_AMX)
// Linux saves the state of the tiles for processes that asked for it.
bool has_matrix_unit() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool tiles = (d >> 24 & 1) != 0;
  const bool bfloat16 = (d >> 22 & 1) != 0;
  if (!tiles || !bfloat16) return false;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a >> 5 & 1) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const KernelTable& kernels_amx() {
  static const KernelTable table = [] {
    KernelTable copy = kernels_avx512();
    copy.name = "amx";
    copy.matrix = &matrix_kernels_amx();
    return copy;
  }();
  return table;
}
#endif

// __builtin_cpu_supports asks both CPUID and XGETBV: a processor whose vector state the operating
// system does not save is reported as not having it.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables = {&kernels_baseline()};
#if defined(FASTFISHER_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&kernels_avx512());
#if defined(FASTFISHER_AMX)
      if (has_matrix_unit()) tables.push_back(&kernels_amx());
#endif
    }
  }
#endif
  return tables;
}

const KernelTable* initial_table() {
  const auto tables = supported_tables();
  const char* cap = std::getenv("FASTFISHER_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return tables.back();
  // A cap above what the machine has is no error: it asks for "at most".
  const std::vector<std::string> order = {"baseline", "avx2", "avx512", "amx"};
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] == cap) return tables[i < tables.size() ? i : tables.size() - 1];
  }
  throw std::invalid_argument("FASTFISHER_CPU_ISA: expected baseline, avx2, avx512 or amx, got '" +
                              std::string(cap) + "'");
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial_table()};
  return table;
}

std::atomic<bool> always{false};

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_tables()) names.emplace_back(table->name);
  return names;
}

void set_isa(const std::string& name) {
  for (const KernelTable* table : supported_tables()) {
    if (name == table->name) {
      current().store(table, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("isa: this machine cannot run '" + name + "'");
}

bool always_matrix_unit() { return always.load(std::memory_order_relaxed); }

void set_always_matrix_unit(bool value) { always.store(value, std::memory_order_relaxed); }

}  // namespace fastfisher::cpu
