#include "hidden_l2.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "give_gradient.h"
#include "level.h"
#include "ops.h"
#include "parallel.h"

namespace {

constexpr int64_t kChunk = 65536;  // elements: one thread's unit of work, and of the fixed summation order
constexpr int64_t kSmall = 32768;  // below that a second thread costs more than it brings
// float16 gradients whose largest component is stored between these are not swept again.
constexpr double kSmallestStored = 1.0, kLargestStored = 65504.0;

int64_t bytes_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Dimensions in the order of the gradient's (else the student's) memory, neighbors merged.
HiddenL2Pair arrange(const HiddenL2Input& input) {
  HiddenL2Pair pair{};
  pair.student = input.student.data;
  pair.teacher = input.teacher.data;
  pair.gradient = input.gradient.data;
  pair.student_dtype = input.student.dtype;
  pair.teacher_dtype = input.teacher.dtype;
  const int64_t* memory_order = input.gradient.data != nullptr ? input.gradient.strides : input.student.strides;
  int order[kMaxDims];
  int dims = 0;
  pair.elements = 1;
  for (int d = 0; d < input.dims; ++d) {
    pair.elements *= input.sizes[d];
    if (input.sizes[d] != 1) order[dims++] = d;
  }
  std::stable_sort(order, order + dims, [&](int a, int b) { return memory_order[a] > memory_order[b]; });
  for (int k = 0; k < dims; ++k) {
    const int64_t size = input.sizes[order[k]];
    const int64_t student = input.student.strides[order[k]], teacher = input.teacher.strides[order[k]];
    const int last = pair.dims - 1;
    if (pair.dims > 0 && pair.student_strides[last] == size * student && pair.teacher_strides[last] == size * teacher) {
      pair.sizes[last] *= size;
      pair.student_strides[last] = student;
      pair.teacher_strides[last] = teacher;
    } else {
      pair.sizes[pair.dims] = size;
      pair.student_strides[pair.dims] = student;
      pair.teacher_strides[pair.dims] = teacher;
      ++pair.dims;
    }
  }
  if (pair.dims == 0) {  // one element
    pair.dims = 1;
    pair.sizes[0] = pair.student_strides[0] = pair.teacher_strides[0] = 1;
  }
  return pair;
}

// Splits every item of `elements[i]` elements into chunks and calls body(i, begin, end, number of the chunk) for each,
// all items in one parallel region. Chunks do not depend on the number of threads.
template <typename Body>
void parallel_chunks(const std::vector<int64_t>& elements, int threads, const Body& body) {
  std::vector<int64_t> first(elements.size() + 1, 0);  // number of each item's first chunk
  int64_t total = 0;
  for (size_t i = 0; i < elements.size(); ++i) {
    first[i + 1] = first[i] + (elements[i] + kChunk - 1) / kChunk;
    total += elements[i];
  }
  if (total < kSmall) threads = 1;
  parallel_rows(first.back(), threads, 0, kKeepDenormals, [&](int64_t begin, int64_t end, float*) {
    size_t item = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[item + 1]) ++item;
      const int64_t from = (chunk - first[item]) * kChunk;
      body(item, from, std::min(from + kChunk, elements[item]), chunk);
    }
  });
}

struct PairSums {
  double sum = 0.0;
  float largest = 0.0f;
};

// Sweeps the pairs once; sums are added in the order of the chunks.
std::vector<PairSums> sweep(const std::vector<HiddenL2Pair>& pairs, int threads) {
  std::vector<int64_t> elements;
  int64_t chunks = 0;
  for (const HiddenL2Pair& pair : pairs) {
    elements.push_back(pair.elements);
    chunks += (pair.elements + kChunk - 1) / kChunk;
  }
  std::vector<HiddenL2Partial> partials(chunks);
  const auto kernel = KDK_AT_LEVEL(hidden_l2_chunk);
  parallel_chunks(elements, threads, [&](size_t item, int64_t begin, int64_t end, int64_t chunk) {
    partials[chunk] = kernel(pairs[item], begin, end);
  });
  std::vector<PairSums> found(pairs.size());
  size_t chunk = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    for (int64_t n = (elements[i] + kChunk - 1) / kChunk; n > 0; --n, ++chunk) {
      found[i].sum += partials[chunk].sum;
      found[i].largest = std::max(found[i].largest, partials[chunk].largest);
    }
  }
  return found;
}

}  // namespace

// The op: arranges every pair, sweeps all of them in one parallel region, reduces in a fixed order.
// terms: r_i ||S_i - T_i||^2 of each pair. post_scale: what backward multiplies each gradient by.
void hidden_l2(const std::vector<HiddenL2Input>& inputs, float* loss, float* terms, float* post_scale, int threads) {
  std::vector<HiddenL2Pair> pairs;
  int64_t gradient_bytes = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    HiddenL2Pair pair = arrange(inputs[i]);
    double coefficient = 2.0 * inputs[i].weight * inputs[i].scale;
    post_scale[i] = 1.0f;
    if (pair.gradient != nullptr) {
      if (pair.student_dtype == kFloat16 && std::isfinite(coefficient)) {
        // Stored as 2^8 m (s - t) with the coefficient's mantissa m in [1/2, 1): a mean over millions of elements
        // cannot flush it to zero, and a power of two costs no rounding. That suits largest differences from 1/128
        // to 256; other pairs are swept again below.
        int exponent = 0;
        coefficient = std::ldexp(std::frexp(coefficient, &exponent), 8);
        post_scale[i] = std::ldexp(1.0f, exponent - 8);
      }
    }
    pair.coefficient = static_cast<float>(coefficient);
    pair.counts = inputs[i].weight != 0.0;
    pairs.push_back(pair);
    if (pair.gradient != nullptr) gradient_bytes += pair.elements * bytes_of(pair.student_dtype);
  }
  for (HiddenL2Pair& pair : pairs) pair.stream = pair.gradient != nullptr && gradient_bytes >= kStreamBytes;
  std::vector<PairSums> sums = sweep(pairs, threads);

  // float16 gradients whose largest component is stored too large or too small are swept once more, with the power of
  // two that brings it to the upper end of float16's range.
  std::vector<HiddenL2Pair> again;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const double stored = std::fabs(pairs[i].coefficient) * static_cast<double>(sums[i].largest);
    if (pairs[i].gradient == nullptr || pairs[i].student_dtype != kFloat16) continue;
    const bool fits = stored >= kSmallestStored && stored <= kLargestStored;
    if (fits || !(stored > 0.0) || !std::isfinite(stored)) continue;
    int exponent = 0;
    std::frexp(stored, &exponent);
    const int power = std::clamp(15 - exponent, -100, 100);
    pairs[i].coefficient = std::ldexp(pairs[i].coefficient, power);
    post_scale[i] = std::ldexp(post_scale[i], -power);
    again.push_back(pairs[i]);
  }
  if (!again.empty()) sweep(again, threads);

  double total = 0.0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const double term = inputs[i].scale * sums[i].sum;
    terms[i] = static_cast<float>(term);
    total += inputs[i].weight * term;
  }
  *loss = static_cast<float>(total);
}

// Scales all stored gradients in place in one parallel region; no work where a factor is 1.
void hidden_l2_give(const std::vector<HiddenL2Given>& gradients, int threads) {
  std::vector<GiveGradientArgs> given;
  std::vector<int64_t> elements;
  for (const HiddenL2Given& gradient : gradients) {
    if (gradient.factor == 1.0f || gradient.elements == 0) continue;
    given.push_back({gradient.data, gradient.dtype, 1, gradient.elements, gradient.factor, nullptr, 0});
    elements.push_back(gradient.elements);
  }
  if (given.empty()) return;
  const auto kernel = KDK_AT_LEVEL(give_gradient_rows);
  parallel_chunks(elements, threads,
                  [&](size_t item, int64_t begin, int64_t end, int64_t) { kernel(given[item], begin, end); });
}
