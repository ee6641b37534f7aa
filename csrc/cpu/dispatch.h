// Which instruction set the CPU kernels run with: the best one that this processor and the
// operating system support, capped by FASTFISHER_CPU_ISA (baseline, avx2, avx512 or amx).
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastfisher::cpu {

// The variant in use.
const KernelTable& kernels();

// Names of the variants that this machine can run, slowest first.
std::vector<std::string> supported_isas();

// Chooses a variant by name; throws std::invalid_argument where this machine cannot run it.
void set_isa(const std::string& name);

// Whether a matrix unit takes all that it can, or only what it is expected to be faster at: for
// tests, whose shapes are small.
bool always_matrix_unit();
void set_always_matrix_unit(bool always);

}  // namespace fastfisher::cpu
