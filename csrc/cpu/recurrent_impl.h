// The kernels of recurrent_kernels.h; part of kernels_impl.h, which includes this file inside its
// namespace, once per instruction set.

// What exp needs to know of a floating-point format. ln(2) is split so that a product of its high
// part with an exponent is exact.
template <typename T>
struct Format;
template <>
struct Format<float> {
  using integer = int32_t;
  static constexpr int mantissa = 23;
  static constexpr int32_t one = 0x3f800000;
  static constexpr float round = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.63p-1f;
  static constexpr float ln2_low = -0x1.bd0106p-13f;
  // The last term of the series that counts, for arguments up to ln(2) / 2.
  static constexpr int terms = 7;
  // exp(-x) is a normal number up to here.
  static constexpr float limit = 87.336f;
};
template <>
struct Format<double> {
  using integer = int64_t;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000;
  static constexpr double round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int terms = 14;
  static constexpr double limit = 708.396;
};

constexpr double reciprocal_factorial(int k) { return k < 2 ? 1 : reciprocal_factorial(k - 1) / k; }

// exp(x) = scale * (1 + rest), for x in [-limit, 0], `scale` a power of two; NaN where x is.
template <typename T>
FF_INLINE void split_exp(typename Vector<T>::type x, typename Vector<T>::type* scale,
                         typename Vector<T>::type* rest) {
  using F = Format<T>;
  using vector = typename Vector<T>::type;
  using integers = typename Vector<typename F::integer>::type;
  // The sum has no bits left for a fraction: its lowest ones are the nearest integer.
  const vector rounded = x * T(1.4426950408889634) + F::round;
  const vector exponent = rounded - F::round;
  *scale = (vector)(((integers)rounded << F::mantissa) + F::one);
  const vector r = x - exponent * F::ln2_high - exponent * F::ln2_low;
  vector series = vector{} + T(reciprocal_factorial(F::terms));
  FF_UNROLL for (int k = F::terms - 1; k >= 2; --k) {
    series = series * r + T(reciprocal_factorial(k));
  }
  *rest = series * (r * r) + r;
}

// 1 / (1 + exp(-x)), 0 where that is no normal number.
template <typename T>
FF_INLINE typename Vector<T>::type sigmoid(typename Vector<T>::type x) {
  using vector = typename Vector<T>::type;
  const vector least = vector{} - Format<T>::limit;
  const vector z = -magnitude(x);
  vector scale, rest;
  split_exp<T>(z < least ? least : z, &scale, &rest);
  const vector e = z < least ? vector{} : scale * rest + scale;
  return (x < 0 ? e : vector{} + T(1)) / (e + T(1));
}

template <typename T>
FF_INLINE typename Vector<T>::type tanh(typename Vector<T>::type x) {
  using vector = typename Vector<T>::type;
  // From here on it rounds to one.
  const vector least = vector{} - T(45);
  const vector z = magnitude(x) * T(-2);
  vector scale, rest;
  split_exp<T>(z < least ? least : z, &scale, &rest);
  const vector less_one = scale * rest + (scale - T(1));
  return (x < 0 ? less_one : -less_one) / (less_one + T(2));
}

// Reads and writes whole vectors.
template <typename T>
struct WholeVector {
  FF_INLINE typename Vector<T>::type read(const T* from) const { return load(from); }
  FF_INLINE void write(T* to, typename Vector<T>::type value) const { store(to, value); }
};

// Reads and writes the first `count` lanes; the others are zeros.
template <typename T>
struct PartOfVector {
  int64_t count;

  FF_INLINE typename Vector<T>::type read(const T* from) const {
    T lanes[Vector<T>::lanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
  }
  FF_INLINE void write(T* to, typename Vector<T>::type value) const {
    T lanes[Vector<T>::lanes];
    store(lanes, value);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
};

// Calls body(row, unit, lanes) for every vector of every row.
template <typename T, typename Body>
FF_INLINE void for_each_vector(int64_t begin, int64_t end, int64_t units, const Body& body) {
  constexpr int64_t L = Vector<T>::lanes;
  for (int64_t n = begin; n < end; ++n) {
    int64_t u = 0;
    for (; u + L <= units; u += L) body(n, u, WholeVector<T>{});
    if (u < units) body(n, u, PartOfVector<T>{units - u});
  }
}

// The sum of two optional operands.
template <typename T, typename Lanes>
FF_INLINE typename Vector<T>::type sum_of(const Rows<const T>& a, const Rows<const T>& b, int64_t n,
                                          int64_t u, const Lanes& lanes) {
  typename Vector<T>::type sum = {};
  if (a.data != nullptr) sum += lanes.read(a[n] + u);
  if (b.data != nullptr) sum += lanes.read(b[n] + u);
  return sum;
}

template <typename T>
void lstm_step(const LstmStep<T>& s, int64_t begin, int64_t end) {
  using vector = typename Vector<T>::type;
  const auto body = [&](int64_t n, int64_t u, const auto& lanes) __attribute__((always_inline)) {
    T* const gates = s.gates[n] + u;
    const auto gate = [&](int k) __attribute__((always_inline)) {
      const vector value = lanes.read(gates + k * s.units);
      return s.bias == nullptr ? value : value + lanes.read(s.bias + k * s.units + u);
    };
    const vector i = sigmoid<T>(gate(0)), f = sigmoid<T>(gate(1));
    const vector g = tanh<T>(gate(2)), o = sigmoid<T>(gate(3));
    const vector cell = f * lanes.read(s.cell[n] + u) + i * g;
    lanes.write(gates, i);
    lanes.write(gates + s.units, f);
    lanes.write(gates + 2 * s.units, g);
    lanes.write(gates + 3 * s.units, o);
    lanes.write(s.next_cell[n] + u, cell);
    lanes.write(s.hidden[n] + u, o * tanh<T>(cell));
  };
  for_each_vector<T>(begin, end, s.units, body);
}

template <typename T>
void lstm_step_backward(const LstmStepBackward<T>& s, int64_t begin, int64_t end) {
  using vector = typename Vector<T>::type;
  const auto body = [&](int64_t n, int64_t u, const auto& lanes) __attribute__((always_inline)) {
    const T* const gates = s.gates[n] + u;
    const vector i = lanes.read(gates), f = lanes.read(gates + s.units);
    const vector g = lanes.read(gates + 2 * s.units), o = lanes.read(gates + 3 * s.units);
    const vector squashed = tanh<T>(lanes.read(s.next_cell[n] + u));
    const vector grad = sum_of(s.grad_output, s.grad_hidden, n, u, lanes);
    T* const grad_cell = s.grad_cell[n] + u;
    const vector d = lanes.read(grad_cell) + grad * o * (T(1) - squashed * squashed);
    T* const grads = s.grad_gates[n] + u;
    lanes.write(grads, d * g * (i * (T(1) - i)));
    lanes.write(grads + s.units, d * lanes.read(s.cell[n] + u) * (f * (T(1) - f)));
    lanes.write(grads + 2 * s.units, d * i * (T(1) - g * g));
    lanes.write(grads + 3 * s.units, grad * squashed * (o * (T(1) - o)));
    lanes.write(grad_cell, d * f);
  };
  for_each_vector<T>(begin, end, s.units, body);
}

template <typename T>
void gru_step(const GruStep<T>& s, int64_t begin, int64_t end) {
  using vector = typename Vector<T>::type;
  const auto body = [&](int64_t n, int64_t u, const auto& lanes) __attribute__((always_inline)) {
    T* const gates = s.gates[n] + u;
    const T* const product = s.product[n] + u;
    const auto share = [&](int k) __attribute__((always_inline)) {
      const vector value = lanes.read(product + k * s.units);
      return s.bias == nullptr ? value : value + lanes.read(s.bias + k * s.units + u);
    };
    const vector r = sigmoid<T>(lanes.read(gates) + share(0));
    const vector z = sigmoid<T>(lanes.read(gates + s.units) + share(1));
    const vector candidate = share(2);
    const vector fresh = tanh<T>(lanes.read(gates + 2 * s.units) + r * candidate);
    lanes.write(gates, r);
    lanes.write(gates + s.units, z);
    lanes.write(gates + 2 * s.units, fresh);
    lanes.write(s.candidate[n] + u, candidate);
    lanes.write(s.next_hidden[n] + u, fresh + z * (lanes.read(s.hidden[n] + u) - fresh));
  };
  for_each_vector<T>(begin, end, s.units, body);
}

template <typename T>
void gru_step_backward(const GruStepBackward<T>& s, int64_t begin, int64_t end) {
  using vector = typename Vector<T>::type;
  const auto body = [&](int64_t n, int64_t u, const auto& lanes) __attribute__((always_inline)) {
    const T* const gates = s.gates[n] + u;
    const vector r = lanes.read(gates), z = lanes.read(gates + s.units);
    const vector fresh = lanes.read(gates + 2 * s.units);
    const Rows<const T> grad_hidden = {s.grad_hidden.data, s.grad_hidden.stride};
    const vector grad = sum_of(s.grad_output, grad_hidden, n, u, lanes);
    const vector grad_fresh = grad * (T(1) - z) * (T(1) - fresh * fresh);
    const vector grad_r = grad_fresh * lanes.read(s.candidate[n] + u) * (r * (T(1) - r));
    const vector grad_z = grad * (lanes.read(s.hidden[n] + u) - fresh) * (z * (T(1) - z));
    T* const grad_gates = s.grad_gates[n] + u;
    T* const grad_product = s.grad_product[n] + u;
    lanes.write(grad_gates, grad_r);
    lanes.write(grad_gates + s.units, grad_z);
    lanes.write(grad_gates + 2 * s.units, grad_fresh);
    lanes.write(grad_product, grad_r);
    lanes.write(grad_product + s.units, grad_z);
    lanes.write(grad_product + 2 * s.units, grad_fresh * r);
    lanes.write(s.grad_hidden[n] + u, grad * z);
  };
  for_each_vector<T>(begin, end, s.units, body);
}

template <typename T>
RecurrentKernels<T> make_recurrent_kernels() {
  return {&lstm_step<T>, &lstm_step_backward<T>, &gru_step<T>, &gru_step_backward<T>};
}
