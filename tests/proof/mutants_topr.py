"""Seeded bugs in the top-R selection."""

from __future__ import annotations

from .mutants import Mutant

_CUDA, _TRITON = "csrc/cuda/topr.cu", "fastfisher/triton/topr.py"

MUTANTS = [
    Mutant(
        "the histogram is used before it is cleared",
        "topr",
        _CUDA,
        """own[bin] = 0;
  __syncthreads();""",
        "own[bin] = 0;",
        "cucheck",
    ),
    Mutant(
        "the histogram is read before all have counted",
        "topr",
        _CUDA,
        """  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {""",
        "  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {",
        "cucheck",
    ),
    Mutant(
        "blocks add their histograms without atomics",
        "topr",
        _CUDA,
        "atomicAdd(&histogram[bin], static_cast<unsigned long long>(own[bin]))",
        "histogram[bin] += own[bin]",
        "cucheck",
    ),
    Mutant(
        "what other warps found of a chunk is read too early",
        "topr",
        _CUDA,
        """      ties_of[warp] = tied;
    }
    __syncthreads();""",
        """      ties_of[warp] = tied;
    }""",
        "cucheck",
    ),
    Mutant(
        "lanes read bits before others wrote them",
        "topr",
        _CUDA,
        "      __syncwarp();\n",
        "",
        "cucheck",
    ),
    Mutant(
        "the last ties are selected",
        "topr",
        _CUDA,
        "ties ^= 0x80000000u >> __clz(static_cast<int>(ties));",
        "ties &= ties - 1;",
        "values",
    ),
    Mutant(
        "one tie too many",
        "topr",
        _CUDA,
        "surplus = __popc(ties) - max(0, own_left - earlier); surplus > 0",
        "surplus = __popc(ties) - max(0, own_left - earlier); surplus > 1",
        "values",
    ),
    Mutant(
        "NaN is above infinity",
        "topr",
        _CUDA,
        "if (magnitude > infinity) return 0;",
        "",
        "values",
    ),
    Mutant(
        "the difference is fused",
        "topr",
        _CUDA,
        "return __fsub_rn(a, __fmul_rn(b, static_cast<float>(weight)));",
        "return __fmaf_rn(-b, static_cast<float>(weight), a);",
        "values",
    ),
    Mutant(
        "a word's tail is read as if it were whole",
        "topr",
        _CUDA,
        "const bool plain = count == kWord && is_plain",
        "const bool plain = is_plain",
        "cucheck",
    ),
    Mutant(
        "vectors of misaligned tensors",
        "topr",
        _CUDA,
        "reinterpret_cast<uintptr_t>(operand.data) % 16 == 0",
        "reinterpret_cast<uintptr_t>(operand.data) % 2 == 0",
        "asan",
    ),
    Mutant(
        "offsets of 32 bits",
        "topr",
        _CUDA,
        "return offset + index * sizes[dims];",
        "return static_cast<int32_t>(offset + index * sizes[dims]);",
        "values",
    ),
    Mutant(
        "the rank of the digit before goes on",
        "topr",
        _CUDA,
        "start.rank - above};",
        "start.rank};",
        "values",
    ),
    Mutant(
        "runs that cross words count twice",
        "topr",
        _CUDA,
        "(ends[w - 1] & 2) == 0) return;",
        "(ends[w - 1] & 4) == 0) return;",
        "values",
    ),
    Mutant(
        "the last word is no one's",
        "topr",
        _CUDA,
        "const int64_t share = (table.words + warps - 1) / warps;",
        "const int64_t share = table.words / warps;",
        "values",
    ),
    Mutant(
        "twin: one tie too few",
        "topr",
        _TRITON,
        "(tied != 0) & (earlier <= left)",
        "(tied != 0) & (earlier < left)",
        "interpreter",
    ),
    Mutant(
        "twin: NaN keeps its bits' place",
        "topr",
        _TRITON,
        "tl.where(magnitude > infinity, -infinity - 1, key)",
        "key",
        "interpreter",
    ),
    Mutant(
        "twin: places beyond a tensor's end count",
        "topr",
        _TRITON,
        "tl.minimum(count - begin, BLOCK)",
        "tl.minimum(count + 1 - begin, BLOCK)",
        "interpreter",
    ),
    Mutant(
        "twin: the ties of a chunk's earlier pieces are forgotten",
        "topr",
        _TRITON,
        "earlier = ties + tl.cumsum(tied, 0)",
        "earlier = tl.cumsum(tied, 0)",
        "interpreter",
    ),
    Mutant(
        "twin: a run ends with its piece",
        "topr",
        _TRITON,
        "joined = tl.where(place == 0, last != 0, joined)",
        "joined = joined & inner",
        "interpreter",
    ),
    Mutant(
        "twin: a digit too far",
        "topr",
        _TRITON,
        "(((keys >> shift) >> bits) == found.to(keys.dtype))",
        "((keys >> shift) == found.to(keys.dtype))",
        "interpreter",
    ),
]
