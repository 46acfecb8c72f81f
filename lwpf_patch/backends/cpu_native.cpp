// Attention with the threshold form of partial forgetting; cpu_native.py says what is computed and calls this.
//
// Query rows lie along the lanes of vector registers, so that what softmax asks of a row is the same for all lanes, and
// no product of matrices needs its factors packed: scores^T = K Q^T, out^T = V^T P^T, dK = dS^T Q. A *panel* is as many
// rows as one product keeps in registers, a *block* some panels, and a *tile* a block's rows and KEYS keys. What a
// score is does not depend on the tile: its sum runs over the features in their order, always, so that scores made
// again are the same bit by bit.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#define BYTES 64
#define MOST_ROWS 12
#elif defined(__AVX__)
#define BYTES 32
#define MOST_ROWS 6
#else
#define BYTES 16
#define MOST_ROWS 6
#endif

#define INLINE inline __attribute__((always_inline))

// Rows of features of all heads of all batch items; the features of a row lie one beside another.
struct View {
  const void* data;
  int64_t strides[3];  // of batch item, head and row
};

// What one call is about; cpu_native.py declares the same. Not in the unnamed namespace: it is an interface.
struct Call {
  View query, key, value, grad;
  View mask;             // (batch item, head, query, key); a stride is 0 where the mask is the same for all
  int64_t mask_stride;   // of a key
  int64_t mask_kind;     // 0: none, 1: boolean, 2: additive
  // The others are dense; of grad_mask, grad_mask_sizes are the first three sizes, each 1 where the mask is the same.
  void *out, *log_sum, *rho, *grad_query, *grad_key, *grad_value, *grad_mask;
  int64_t grad_mask_sizes[3];
  int64_t batch, length, keys, width, value_width, heads;  // batch: of items times heads
  int64_t causal, threads, drops, has_mu, has_bias;
  uint64_t seed;
  double scale, mu, noise, bias, n, lowest, dropout_p;
  double* found;  // threshold, median, and how many scores are equal to it: of the forward pass, for the backward pass
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
};

namespace {

using Index = int64_t;

constexpr Index KEYS = 64;    // keys of a tile
constexpr Index PANELS = 4;   // at most, of a block
constexpr Index TASKS = 8;    // at least, for each thread, of the backward pass

// A call with what the threshold makes of it. Scores that are at most a are forgotten, and become b.
struct Attention : Call {
  double a = 0, b = 0, centre = 0;  // centre: the threshold without noise
  Index ties = 0;                   // how many scores are equal to the median; 0: it has no gradient

  explicit Attention(const Call& call) : Call(call) {}

  template <class T>
  const T* at(const View& view, Index item, Index row = 0) const {
    const Index* strides = view.strides;
    return static_cast<const T*>(view.data) + item / heads * strides[0] + item % heads * strides[1] + row * strides[2];
  }
};

template <class T>
struct Whole;
template <>
struct Whole<float> {
  using type = int32_t;
};
template <>
struct Whole<double> {
  using type = int64_t;
};

template <class T>
struct Lanes {
  typedef T V __attribute__((vector_size(BYTES)));
  typedef typename Whole<T>::type I __attribute__((vector_size(BYTES)));
  static constexpr Index count = BYTES / sizeof(T);
  static constexpr Index panel = 2 * count;
};

template <class T>
using V = typename Lanes<T>::V;
template <class T>
using I = typename Lanes<T>::I;

template <class T>
constexpr T INF = std::numeric_limits<T>::infinity();

template <class T>
INLINE V<T> load(const T* from) {
  V<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
INLINE void store(T* to, V<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
INLINE V<T> all(T number) {
  return V<T>{} + number;
}

template <class T>
INLINE V<T> only(I<T> where, V<T> v) {
  return (V<T>)(where & (I<T>)v);
}

// exp, 0 where it would be denormal: that takes a processor many times as long.
INLINE V<float> exponential(V<float> x) {
  const V<float> shifted = x * 1.44269504f + 12582912.0f;  // the whole number nearest to it, in the last bits
  const V<float> whole = shifted - 12582912.0f;
  const V<float> r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p = (V<float>)((I<float>)p + ((I<float>)shifted << 23));
  p = only<float>(~(I<float>)(x < -87.0f), p);
  return (x <= 88.0f) ? p : ((x > 88.0f) ? all(INF<float>) : x);  // NaN stays NaN
}

INLINE V<double> exponential(V<double> x) {
  V<double> p;
  for (Index i = 0; i < Lanes<double>::count; i++) p[i] = x[i] < -700.0 ? 0.0 : std::exp(x[i]);
  return p;
}

// --- products of matrices -------------------------------------------------------------------------------------------

// Adds A B to registers: A(m, k) lies at a[m * lda + k], or for COLUMNS at a[k * lda + m].
template <class T, int M, int N, bool COLUMNS>
INLINE void multiply(V<T> (&sum)[M][N], const T* a, Index lda, const T* b, Index ldb, Index depth) {
#pragma GCC unroll 2
  for (Index k = 0; k < depth; k++) {
    V<T> row[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) row[j] = load(b + k * ldb + j * Lanes<T>::count);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const T factor = COLUMNS ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) sum[m][j] += factor * row[j];
    }
  }
}

template <class T, int M, int N>
INLINE void put(const V<T> (&sum)[M][N], T* c, Index ldc, bool add) {
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      T* to = c + m * ldc + j * Lanes<T>::count;
      store(to, add ? load(to) + sum[m][j] : sum[m][j]);
    }
}

// Calls work<M>(first row) for groups of M rows, MOST_ROWS as long as there are so many.
template <class Work>
INLINE void by_groups(Index rows, const Work& work) {
  Index m = 0;
  for (; m + MOST_ROWS <= rows; m += MOST_ROWS) work(std::integral_constant<int, MOST_ROWS>(), m);
  for (; m + 4 <= rows; m += 4) work(std::integral_constant<int, 4>(), m);
  if (m + 2 <= rows) {
    work(std::integral_constant<int, 2>(), m);
    m += 2;
  }
  if (m < rows) work(std::integral_constant<int, 1>(), m);
}

// C = A B, or C += A B, where the rows of B and C are those of a panel.
template <class T, int N, bool COLUMNS>
void product(Index rows, Index depth, const T* a, Index lda, const T* b, T* c, bool add) {
  constexpr Index ld = N * Lanes<T>::count;
  by_groups(rows, [&](auto group, Index m) {
    constexpr int M = decltype(group)::value;
    V<T> sum[M][N] = {};
    multiply<T, M, N, COLUMNS>(sum, a + (COLUMNS ? m : m * lda), lda, b, ld, depth);
    put<T, M, N>(sum, c + m * ld, ld, add);
  });
}

// --- blocks ---------------------------------------------------------------------------------------------------------

// Some rows of scores of one batch item.
template <class T>
struct Block {
  Index item, start, rows;

  Index panels() const { return (rows + Lanes<T>::panel - 1) / Lanes<T>::panel; }
  Index rows_of(Index p) const { return std::min(Lanes<T>::panel, rows - p * Lanes<T>::panel); }
  // Lanes of a panel: the last one may do with one register instead of two.
  Index lanes_of(Index p) const { return rows_of(p) > Lanes<T>::count ? Lanes<T>::panel : Lanes<T>::count; }
};

template <class T>
Index panels_of(const Attention& call) {
  return (call.length + Lanes<T>::panel - 1) / Lanes<T>::panel;
}

template <class T>
Index blocks_of(const Attention& call) {
  return (panels_of<T>(call) + PANELS - 1) / PANELS;
}

template <class T>
Block<T> block_of(const Attention& call, Index item, Index number) {
  const Index panels = panels_of<T>(call), blocks = blocks_of<T>(call);
  const Index first = number * panels / blocks * Lanes<T>::panel;
  const Index end = std::min(call.length, (number + 1) * panels / blocks * Lanes<T>::panel);
  return {item, first, end - first};
}

// Calls work<N>(panel) for each panel of a block, N being its registers.
template <class T, class Work>
INLINE void by_panels(const Block<T>& block, const Work& work) {
  for (Index p = 0; p < block.panels(); p++) {
    if (block.lanes_of(p) == Lanes<T>::panel)
      work(std::integral_constant<int, 2>(), p);
    else
      work(std::integral_constant<int, 1>(), p);
  }
}

// Memory of a thread that its next calls use again.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  template <class T>
  T* take(Index count) {
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(memory_ + used_ - (count * sizeof(T) + 63) / 64 * 64);
  }

  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    memory_ = nullptr, size_ = 0;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 4096, bytes)) throw std::bad_alloc();
    memory_ = static_cast<char*>(fresh), size_ = bytes;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

// Turns rows of features into features of a panel's rows, times a factor; lanes without a row become 0.
template <class T>
void turn_in(const T* rows, Index stride, Index count, Index lanes, Index width, T factor, T* panel) {
  for (Index q = 0; q < count; q++)
    for (Index e = 0; e < width; e++) panel[e * lanes + q] = rows[q * stride + e] * factor;
  for (Index q = count; q < lanes; q++)
    for (Index e = 0; e < width; e++) panel[e * lanes + q] = 0;
}

template <class T>
void turn_out(const T* panel, Index count, Index lanes, Index width, T factor, T* rows) {
  for (Index q = 0; q < count; q++)
    for (Index e = 0; e < width; e++) rows[q * width + e] = panel[e * lanes + q] * factor;
}

// Sets the scores of excluded keys in a panel of a tile to -inf, counts them for each lane, and adds an additive mask.
template <class T, int N>
void exclude(const Attention& call, const Block<T>& block, Index p, Index first, Index keys, T* scores, I<T>* excluded) {
  constexpr Index count = Lanes<T>::count, lanes = N * count;
  const Index row = block.start + p * Lanes<T>::panel;
  if (call.causal) {
    if (first + keys - 1 <= row) return;
    I<T> rows[N];
    for (Index q = 0; q < lanes; q++) rows[q / count][q % count] = row + q - first;
    for (Index k = 0; k < keys; k++)
      for (int j = 0; j < N; j++) {
        T* to = scores + k * lanes + j * count;
        const I<T> hidden = (I<T>)(rows[j] < (typename Whole<T>::type)k);
        store<T>(to, hidden ? all(-INF<T>) : load(to));
        excluded[j] -= hidden;
      }
    return;
  }
  const Index rows = block.rows_of(p), stride = call.mask_stride;
  for (Index q = 0; q < rows; q++) {
    T* to = scores + q;
    Index hidden = 0;
    if (call.mask_kind == 1) {
      const bool* mask = call.at<bool>(call.mask, block.item, row + q) + first * stride;
      for (Index k = 0; k < keys; k++) {
        const bool seen = mask[k * stride];
        to[k * lanes] = seen ? to[k * lanes] : -INF<T>;
        hidden += !seen;
      }
    } else {
      const T* mask = call.at<T>(call.mask, block.item, row + q) + first * stride;
      for (Index k = 0; k < keys; k++) {
        const T added = mask[k * stride];
        const bool seen = !(added <= (T)call.lowest);
        to[k * lanes] = seen ? to[k * lanes] + added : -INF<T>;
        hidden += !seen;
      }
    }
    excluded[q / count][q % count] += hidden;
  }
}

template <class T>
Index keys_of(const Attention& call, const Block<T>& block) {
  return call.causal ? std::min(call.keys, block.start + block.rows) : call.keys;
}

// Makes the scores of a panel of a tile.
template <class T, int N>
INLINE void make_scores(const Attention& call, const Block<T>& block, Index p, Index first, Index keys, const T* turned,
                        T* scores, I<T>* excluded) {
  product<T, N, false>(keys, call.width, call.at<T>(call.key, block.item, first), call.key.strides[2], turned, scores,
                       false);
  if (call.causal || call.mask_kind) exclude<T, N>(call, block, p, first, keys, scores, excluded);
}

// Turns rows of a panel, of queries or of gradients, as turn_in does.
template <class T>
INLINE void turn_panel(const Attention& call, const View& view, const Block<T>& block, Index p, Index width, T factor,
                       T* turned) {
  turn_in<T>(call.at<T>(view, block.item, block.start + p * Lanes<T>::panel), view.strides[2], block.rows_of(p),
             block.lanes_of(p), width, factor, turned);
}

// --- dropout --------------------------------------------------------------------------------------------------------

INLINE uint64_t mix(uint64_t z) {  // SplitMix64's
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

// What dropout multiplies the weights of a panel with: a hash of the seed, the row and the column, so that both passes,
// any threads, and cpu_dropout.py, which computes the same, drop the same weights.
template <class T, int N>
class Dropout {
 public:
  Dropout(const Attention& call, const Block<T>& block, Index p) {
    const uint64_t row = block.item * call.length + block.start + p * Lanes<T>::panel;
    for (Index q = 0; q < N * count; q++) {
      const uint64_t key = mix(call.seed + (row + q + 1) * GOLDEN);
      low_[q / count][q % count] = (uint32_t)key, high_[q / count][q % count] = (uint32_t)(key >> 32);
    }
    limit_ = (int32_t)std::min(call.dropout_p * 2147483648.0, 2147483647.0);
    factor_ = call.dropout_p < 1 ? 1 / (1 - call.dropout_p) : 0;
  }

  INLINE V<T> of(Index column, int j) const {
    Words x = low_[j] + (uint32_t)column * (uint32_t)(GOLDEN >> 32);
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu + high_[j];  // the constants are MurmurHash3's
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    x = (x ^ (x >> 16)) >> 1;
    return only<T>(__builtin_convertvector((Signed)x >= limit_, I<T>), all(factor_));
  }

 private:
  static constexpr Index count = Lanes<T>::count;
  typedef uint32_t Words __attribute__((vector_size(count * 4)));
  typedef int32_t Signed __attribute__((vector_size(count * 4)));

  Words low_[N], high_[N];
  int32_t limit_;
  T factor_;
};

// Drops some weights of a panel of a tile.
template <class T, int N>
void drop(const Attention& call, const Block<T>& block, Index p, Index first, Index keys, T* weights) {
  const Dropout<T, N> dropout(call, block, p);
  for (Index k = 0; k < keys; k++)
    for (int j = 0; j < N; j++) {
      T* at = weights + (k * N + j) * Lanes<T>::count;
      store<T>(at, load(at) * dropout.of(first + k, j));
    }
}

// --- forward --------------------------------------------------------------------------------------------------------

// What is known of the rows of a panel, after some of their keys: sums are of exp(score - highest).
template <class T, int N>
struct Rows {
  V<T> highest[N], sum[N];
  I<T> forgotten[N], excluded[N];  // how many; those that are excluded are among the forgotten
};

// Turns the scores of a panel of a tile into weights, 0 where they are forgotten.
template <class T, int N>
void weigh(Rows<T, N>& rows, T a, T* scores, Index keys, T* out, Index value_width) {
  constexpr Index count = Lanes<T>::count, lanes = N * count;
  V<T> highest[N];
  for (int j = 0; j < N; j++) highest[j] = rows.highest[j];
  for (Index k = 0; k < keys; k++)
    for (int j = 0; j < N; j++) {
      const V<T> s = load(scores + k * lanes + j * count);
      const V<T> kept = (s <= a) ? all(-INF<T>) : s;
      highest[j] = kept > highest[j] ? kept : highest[j];
    }
  bool rise = false;
  V<T> factor[N];
  for (int j = 0; j < N; j++) {
    const I<T> same = (I<T>)(highest[j] == rows.highest[j]);
    factor[j] = same ? all((T)1) : exponential(rows.highest[j] - highest[j]);
    for (Index i = 0; i < count; i++) rise |= !same[i];
    rows.highest[j] = highest[j];
  }
  if (rise) {
    for (int j = 0; j < N; j++) rows.sum[j] *= factor[j];
    for (Index e = 0; e < value_width; e++)
      for (int j = 0; j < N; j++) {
        T* to = out + e * lanes + j * count;
        store<T>(to, load(to) * factor[j]);
      }
  }
  V<T> sum[N] = {};
  I<T> forgotten[N] = {};
  for (Index k = 0; k < keys; k++)
    for (int j = 0; j < N; j++) {
      T* at = scores + k * lanes + j * count;
      const V<T> s = load(at);
      const I<T> below = (I<T>)(s <= a);
      const V<T> weight = only<T>(~below, exponential(s - highest[j]));
      store<T>(at, weight);
      sum[j] += weight;
      forgotten[j] -= below;
    }
  for (int j = 0; j < N; j++) rows.sum[j] += sum[j], rows.forgotten[j] += forgotten[j];
}

template <class T, int N>
void finish_rows(const Attention& call, const Block<T>& block, Index p, Rows<T, N>& rows, T* out) {
  constexpr Index count = Lanes<T>::count, lanes = N * count;
  const T b = call.b, log_n = call.n > 0 ? std::log(call.n) : -INF<double>;
  const Index start = block.item * call.length + block.start + p * Lanes<T>::panel, keys = keys_of(call, block);
  T log_sum[lanes], rho[lanes];
  for (int j = 0; j < N; j++) {
    const I<T> forgotten = rows.forgotten[j] - rows.excluded[j];
    const I<T> empty = (I<T>)(rows.excluded[j] == (typename Whole<T>::type)keys);
    V<T> highest = rows.highest[j], number;
    for (Index i = 0; i < count; i++) number[i] = forgotten[i];
    highest = (I<T>)((forgotten > 0) & (I<T>)(all(b) > highest)) ? all(b) : highest;
    highest = all(log_n) > highest ? all(log_n) : highest;
    const I<T> same = (I<T>)(rows.highest[j] == highest);
    const V<T> factor = same ? all((T)1) : exponential(rows.highest[j] - highest);
    const V<T> part = only<T>((I<T>)(forgotten > 0), number * exponential(all(b) - highest));
    V<T> total = rows.sum[j] * factor + part;
    if (call.n > 0) total += exponential(all(log_n) - highest);
    total = (same & (I<T>)(highest == -INF<T>)) ? all(std::numeric_limits<T>::quiet_NaN()) : total;
    total = empty ? all((T)1) : total;
    highest = empty ? all((T)0) : highest;
    const V<T> share = only<T>(~empty, part / total), divided = factor / total;
    for (Index i = 0; i < count; i++) log_sum[j * count + i] = highest[i] + std::log(total[i]);
    store<T>(rho + j * count, share);
    for (Index e = 0; e < call.value_width; e++) {
      T* to = out + e * lanes + j * count;
      store<T>(to, load(to) * divided);
    }
  }
  const Index real = block.rows_of(p);
  std::copy(log_sum, log_sum + real, static_cast<T*>(call.log_sum) + start);
  std::copy(rho, rho + real, static_cast<T*>(call.rho) + start);
  turn_out<T>(out, real, lanes, call.value_width, 1, static_cast<T*>(call.out) + start * call.value_width);
}

template <class T>
void forward_block(const Attention& call, const Block<T>& block) {
  const Index last = keys_of(call, block);
  scratch.reserve(sizeof(T) * Lanes<T>::panel * (call.width + call.value_width + KEYS) + 3 * 64);
  T* const turned = scratch.take<T>(call.width * Lanes<T>::panel);
  T* const scores = scratch.take<T>(KEYS * Lanes<T>::panel);
  T* const out = scratch.take<T>(call.value_width * Lanes<T>::panel);
  by_panels(block, [&](auto registers, Index p) {
    constexpr int N = decltype(registers)::value;
    constexpr Index lanes = N * Lanes<T>::count;
    turn_panel<T>(call, call.query, block, p, call.width, call.scale, turned);
    std::fill(out, out + call.value_width * lanes, (T)0);
    Rows<T, N> rows = {};
    for (int j = 0; j < N; j++) rows.highest[j] = all(-INF<T>);
    for (Index first = 0; first < last; first += KEYS) {
      const Index keys = std::min(KEYS, last - first);
      make_scores<T, N>(call, block, p, first, keys, turned, scores, rows.excluded);
      weigh<T, N>(rows, call.a, scores, keys, out, call.value_width);
      if (call.drops) drop<T, N>(call, block, p, first, keys, scores);
      product<T, N, true>(call.value_width, keys, call.at<T>(call.value, block.item, first), call.value.strides[2],
                          scores, out, true);
    }
    finish_rows<T, N>(call, block, p, rows, out);
  });
}

// --- backward -------------------------------------------------------------------------------------------------------

// Adds scores^T rows to a gradient of keys or values; the scores are those of a block's panels, KEYS panel apart.
template <class T>
void add_to_keys(const Block<T>& block, Index keys, const T* scores, const T* rows, Index stride, Index width, T* total,
                 bool add) {
  constexpr Index count = Lanes<T>::count, panel = Lanes<T>::panel;
  by_groups(keys, [&](auto group, Index m) {
    constexpr int M = decltype(group)::value;
    const auto columns = [&](auto registers, Index e) {
      constexpr int N = decltype(registers)::value;
      V<T> sum[M][N] = {};
      for (Index p = 0; p < block.panels(); p++) {
        const Index lanes = block.lanes_of(p);
        multiply<T, M, N, false>(sum, scores + p * KEYS * panel + m * lanes, lanes, rows + p * panel * stride + e,
                                 stride, block.rows_of(p));
      }
      put<T, M, N>(sum, total + m * width + e, width, add);
    };
    Index e = 0;
    for (; e + panel <= width; e += panel) columns(std::integral_constant<int, 2>(), e);
    for (; e + count <= width; e += count) columns(std::integral_constant<int, 1>(), e);
  });
}

// Where the gradient of a mask is wanted, the batch items that share a part of the mask, a *slice*, take turns in a task:
// their gradients are added up for a block, and leave it together. Else each batch item is a slice of its own. The items
// of a slice are dealt out among *segments*, the blocks of an item among *chunks*, so that there are enough tasks; what
// two tasks add to, both have a copy of, and the copies are added up at the end, always in the same order.
template <class T>
struct Backward {
  const Attention& call;
  T share;  // of the threshold's gradient, for each score that is equal to the median
  Index slices, slice_heads, item_heads, items;  // items and their heads: of a slice
  Index segments, chunks;
  std::vector<T> parts;                        // of the gradients of keys and values, from chunks after the first
  std::vector<T> copies;                       // of the gradient of the mask
  std::vector<std::atomic<Index>> unfinished;  // chunks of each batch item

  Backward(const Attention& call, T share) : call(call), share(share), unfinished(call.batch) {
    slice_heads = call.grad_mask ? call.grad_mask_sizes[1] : call.heads;
    slices = call.grad_mask ? call.grad_mask_sizes[0] * slice_heads : call.batch;
    items = call.batch / slices, item_heads = call.heads / slice_heads;
    const Index tasks = TASKS * call.threads;
    segments = std::min((tasks + slices - 1) / slices, items);
    if (mask_rows() > 1) {  // copies take no more memory than there are queries, keys and values
      const Index given = call.batch * (call.length * call.width + part_size());
      segments = std::min(segments, 1 + given / (slices * mask_rows() * call.keys));
    }
    const Index most = std::max<Index>(1, call.length / (2 * (call.width + call.value_width)));
    chunks = std::min({(tasks + slices * segments - 1) / (slices * segments), blocks_of<T>(call), most});
    parts.resize((chunks - 1) * call.batch * part_size());
    if (call.grad_mask) copies.resize((copies_count() - 1) * slices * mask_rows() * call.keys);
    for (auto& each : unfinished) each = chunks;
  }

  Index tasks() const { return slices * segments * chunks; }
  Index item_of(Index slice, Index i) const {
    return (slice / slice_heads + i / item_heads) * call.heads + slice % slice_heads + i % item_heads;
  }

  Index mask_rows() const { return call.grad_mask ? call.grad_mask_sizes[2] : 0; }
  Index copies_count() const { return segments * (mask_rows() > 1 ? 1 : chunks); }
  T* grad_mask(Index slice, Index copy) {
    T* const whole = copy ? copies.data() + (copy - 1) * slices * mask_rows() * call.keys : static_cast<T*>(call.grad_mask);
    return whole + slice * mask_rows() * call.keys;
  }

  Index part_size() const { return call.keys * (call.width + call.value_width); }
  T* grad_key(Index item, Index chunk) {
    if (!chunk) return static_cast<T*>(call.grad_key) + item * call.keys * call.width;
    return parts.data() + (item * (chunks - 1) + chunk - 1) * part_size();
  }
  T* grad_value(Index item, Index chunk) {
    if (!chunk) return static_cast<T*>(call.grad_value) + item * call.keys * call.value_width;
    return grad_key(item, chunk) + call.keys * call.width;
  }

  void task(Index number) {
    const Index chunk = number % chunks, segment = number / chunks % segments, slice = number / chunks / segments;
    const Index blocks = blocks_of<T>(call);
    const Index first = chunk * blocks / chunks, end = (chunk + 1) * blocks / chunks;
    const Index first_item = segment * items / segments, end_item = (segment + 1) * items / segments;
    if (call.causal)  // not every block reaches every key
      for (Index i = first_item; i < end_item; i++) {
        const Index item = item_of(slice, i);
        std::fill_n(grad_key(item, chunk), call.keys * call.width, (T)0);
        std::fill_n(grad_value(item, chunk), call.keys * call.value_width, (T)0);
      }
    const Room room(call);
    for (Index b = first; b < end; b++) {
      for (Index i = first_item; i < end_item; i++) {
        const Index item = item_of(slice, i);
        block(room, block_of<T>(call, item, b), grad_key(item, chunk), grad_value(item, chunk), call.causal || b > first,
              i > first_item);
      }
      if (call.grad_mask)
        add_to_mask(room, block_of<T>(call, 0, b), grad_mask(slice, mask_rows() > 1 ? segment : segment * chunks + chunk));
    }
    for (Index i = first_item; i < end_item; i++) {
      const Index item = item_of(slice, i);
      if (unfinished[item].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(item);
    }
  }

  void finish(Index item) {
    T *const key = grad_key(item, 0), *const value = grad_value(item, 0);
    for (Index chunk = 1; chunk < chunks; chunk++) {
      const T *const more = grad_key(item, chunk), *const more_value = grad_value(item, chunk);
      for (Index i = 0; i < call.keys * call.width; i++) key[i] += more[i];
      for (Index i = 0; i < call.keys * call.value_width; i++) value[i] += more_value[i];
    }
    const T scale = call.scale;
    for (Index i = 0; i < call.keys * call.width; i++) key[i] *= scale;
  }

  void finish_mask(Index slice) {
    T* const total = grad_mask(slice, 0);
    for (Index copy = 1; copy < copies_count(); copy++) {
      const T* const more = grad_mask(slice, copy);
      for (Index i = 0; i < mask_rows() * call.keys; i++) total[i] += more[i];
    }
  }

  // What a thread works with: of a block's panels, each as for the largest one.
  struct Room {
    T *query, *grad, *grad_query, *scores, *inner, *log_sum, *delta;
    T* mask;  // the gradient of the scores, of all keys, as they lie in tiles

    explicit Room(const Attention& call) {
      constexpr Index rows = Lanes<T>::panel * PANELS;
      const Index mask_keys = call.grad_mask ? call.keys : 0;
      scratch.reserve(sizeof(T) * rows * (2 * call.width + call.value_width + 2 * KEYS + 2 + mask_keys) + 8 * 64);
      query = scratch.take<T>(call.width * rows);
      grad = scratch.take<T>(call.value_width * rows);
      grad_query = scratch.take<T>(call.width * rows);
      scores = scratch.take<T>(KEYS * rows);
      inner = scratch.take<T>(KEYS * rows);
      log_sum = scratch.take<T>(rows);
      delta = scratch.take<T>(rows);
      mask = scratch.take<T>(mask_keys * rows);
    }
  };

  void block(const Room& room, const Block<T>& block, T* grad_key, T* grad_value, bool add, bool add_to_room) {
    constexpr Index panel = Lanes<T>::panel;
    const Index last = keys_of(call, block), panels = block.panels(), start = block.item * call.length + block.start;
    std::fill_n(room.log_sum, panels * panel, (T)0);
    std::fill_n(room.delta, panels * panel, (T)0);
    std::copy_n(static_cast<const T*>(call.log_sum) + start, block.rows, room.log_sum);
    deltas(call, block.item, block.start, block.rows, room.delta);
    for (Index p = 0; p < panels; p++) {
      turn_panel<T>(call, call.query, block, p, call.width, call.scale, room.query + p * call.width * panel);
      turn_panel<T>(call, call.grad, block, p, call.value_width, 1, room.grad + p * call.value_width * panel);
    }
    const T* const query = call.at<T>(call.query, block.item, block.start);
    const T* const grad = call.at<T>(call.grad, block.item, block.start);
    for (Index first = 0; first < last; first += KEYS) {
      const Index keys = std::min(KEYS, last - first);
      const T* const key = call.at<T>(call.key, block.item, first);
      const T* const value = call.at<T>(call.value, block.item, first);
      by_panels(block, [&](auto registers, Index p) {
        constexpr int N = decltype(registers)::value;
        constexpr Index lanes = N * Lanes<T>::count;
        T *const s = room.scores + p * KEYS * panel, *const g = room.inner + p * KEYS * panel;
        I<T> excluded[N] = {};
        make_scores<T, N>(call, block, p, first, keys, room.query + p * call.width * panel, s, excluded);
        product<T, N, false>(keys, call.value_width, value, call.value.strides[2],
                             room.grad + p * call.value_width * panel, g, false);
        if (call.drops) drop<T, N>(call, block, p, first, keys, g);
        differentiate<N>(keys, room.log_sum + p * panel, room.delta + p * panel, s, g);
        if (call.drops) drop<T, N>(call, block, p, first, keys, s);
        if (call.grad_mask) {
          T* const total = room.mask + p * call.keys * panel + first * lanes;
          for (Index i = 0; i < keys * lanes; i += Lanes<T>::count)
            store<T>(total + i, add_to_room ? load(total + i) + load(g + i) : load(g + i));
        }
        product<T, N, true>(call.width, keys, key, call.key.strides[2], g, room.grad_query + p * call.width * panel,
                            first > 0);
      });
      add_to_keys<T>(block, keys, room.scores, grad, call.grad.strides[2], call.value_width,
                     grad_value + first * call.value_width, add);
      add_to_keys<T>(block, keys, room.inner, query, call.query.strides[2], call.width, grad_key + first * call.width,
                     add);
    }
    for (Index p = 0; p < panels; p++)
      turn_out<T>(room.grad_query + p * call.width * panel, block.rows_of(p), block.lanes_of(p), call.width, call.scale,
                  static_cast<T*>(call.grad_query) + (start + p * panel) * call.width);
  }

  // Adds the gradient of the scores of a block to a slice of the mask's, or puts it there where it is all that comes.
  void add_to_mask(const Room& room, const Block<T>& block, T* slice) const {
    constexpr Index panel = Lanes<T>::panel;
    const bool each_row = mask_rows() > 1;
    for (Index p = 0; p < block.panels(); p++) {
      const Index lanes = block.lanes_of(p), rows = block.rows_of(p);
      for (Index first = 0; first < call.keys; first += KEYS) {
        const Index keys = std::min(KEYS, call.keys - first);
        const T* const from = room.mask + p * call.keys * panel + first * lanes;
        for (Index q = 0; q < rows; q++) {
          T* const to = slice + (each_row ? (block.start + p * panel + q) * call.keys : 0) + first;
          if (each_row)
            for (Index k = 0; k < keys; k++) to[k] = from[k * lanes + q];
          else
            for (Index k = 0; k < keys; k++) to[k] += from[k * lanes + q];
        }
      }
    }
  }

  // Turns scores into weights, and the weights' gradients into those of the scores.
  template <int N>
  void differentiate(Index keys, const T* log_sum, const T* delta, T* scores, T* inner) const {
    constexpr Index count = Lanes<T>::count, lanes = N * count;
    const T a = call.a, centre = call.centre;
    const bool ties = call.ties > 0;
    V<T> l[N], d[N];
    for (int j = 0; j < N; j++) l[j] = load(log_sum + j * count), d[j] = load(delta + j * count);
    for (Index k = 0; k < keys; k++)
      for (int j = 0; j < N; j++) {
        const Index i = k * lanes + j * count;
        const V<T> s = load(scores + i);
        const V<T> weight = only<T>(~(I<T>)(s <= a), exponential(s - l[j]));
        V<T> grad = weight * (load(inner + i) - d[j]);
        if (ties) grad += only<T>((I<T>)(s == centre), all(share));
        store<T>(scores + i, weight);
        store<T>(inner + i, grad);
      }
  }

  static void deltas(const Attention& call, Index item, Index start, Index rows, T* delta) {
    constexpr Index count = Lanes<T>::count;
    const T* out = static_cast<const T*>(call.out) + (item * call.length + start) * call.value_width;
    const T* grad = call.at<T>(call.grad, item, start);
    for (Index q = 0; q < rows; q++) {
      V<T> sum = {};
      for (Index e = 0; e < call.value_width; e += count)
        sum += load(out + q * call.value_width + e) * load(grad + q * call.grad.strides[2] + e);
      delta[q] = 0;
      for (Index i = 0; i < count; i++) delta[q] += sum[i];
    }
  }
};

// --- the median -----------------------------------------------------------------------------------------------------

// What a thread finds of the scores below and strictly within a bracket; memory of its own keeps threads apart.
template <class T>
struct alignas(128) Found {
  Index valid = 0, below = 0, within = 0;
  bool nan = false;
  std::vector<T> values;
};

template <class T>
void count_block(const Attention& call, const Block<T>& block, T low, T high, bool collect, Found<T>& found) {
  constexpr Index count = Lanes<T>::count;
  const Index last = keys_of(call, block);
  scratch.reserve(sizeof(T) * Lanes<T>::panel * (call.width + KEYS) + 2 * 64);
  T* const turned = scratch.take<T>(call.width * Lanes<T>::panel);
  T* const scores = scratch.take<T>(KEYS * Lanes<T>::panel);
  by_panels(block, [&](auto registers, Index p) {
    constexpr int N = decltype(registers)::value;
    constexpr Index lanes = N * count;
    const Index rows = block.rows_of(p);
    turn_panel<T>(call, call.query, block, p, call.width, call.scale, turned);
    I<T> excluded[N] = {}, below[N] = {}, within[N] = {}, nan[N] = {}, real[N];
    for (Index q = 0; q < lanes; q++) real[q / count][q % count] = q < rows ? -1 : 0;
    for (Index first = 0; first < last; first += KEYS) {
      const Index keys = std::min(KEYS, last - first);
      make_scores<T, N>(call, block, p, first, keys, turned, scores, excluded);
      const size_t size = found.values.size();
      size_t end = size;
      if (collect) found.values.resize(size + keys * lanes);
      T* const values = found.values.data();
      for (Index k = 0; k < keys; k++)
        for (int j = 0; j < N; j++) {
          const V<T> s = load(scores + k * lanes + j * count);
          const I<T> inside = (I<T>)(s > low) & (I<T>)(s < high) & real[j];
          below[j] -= (I<T>)(s <= low);
          nan[j] |= (I<T>)(s != s);
          within[j] -= inside;
          if (!collect) continue;
          typedef long long Words __attribute__((vector_size(BYTES)));
          const Words words = (Words)inside;
          long long any = 0;
          for (size_t i = 0; i < BYTES / sizeof(long long); i++) any |= words[i];
          if (!any) continue;
          for (Index i = 0; i < count; i++) {
            values[end] = s[i];
            end -= inside[i];
          }
        }
      if (collect) found.values.resize(end);
    }
    for (Index q = 0; q < rows; q++) {
      const Index j = q / count, i = q % count;
      found.valid += last - excluded[j][i];
      found.below += below[j][i] - excluded[j][i];
      found.within += within[j][i];
      found.nan |= nan[j][i] != 0;
    }
  });
}

struct Random {  // SplitMix64
  uint64_t state;

  Index below(Index limit) { return (Index)(((unsigned __int128)mix(state += GOLDEN) * (uint64_t)limit) >> 64); }
};

// Draws some scores that count and are numbers.
template <class T>
std::vector<T> draw(const Attention& call) {
  const Index total = call.batch * call.length * call.keys;
  const Index size = std::pow((double)total, 0.6);
  Random random{(uint64_t)total};
  std::vector<T> sample;
  sample.reserve(size);
  for (Index drawn = 0; drawn < size; drawn++) {
    const Index item = random.below(call.batch), row = random.below(call.length), column = random.below(call.keys);
    if (call.causal && column > row) continue;
    T added = 0;
    if (call.mask_kind == 1 && !call.at<bool>(call.mask, item, row)[column * call.mask_stride]) continue;
    if (call.mask_kind == 2) {
      added = call.at<T>(call.mask, item, row)[column * call.mask_stride];
      if (added <= (T)call.lowest) continue;
    }
    const T *const query = call.at<T>(call.query, item, row), *const key = call.at<T>(call.key, item, column);
    const T scale = call.scale;
    V<T> sums = {};
    for (Index e = 0; e < call.width; e += Lanes<T>::count) sums += load(query + e) * scale * load(key + e);
    T score = added;
    for (Index i = 0; i < Lanes<T>::count; i++) score += sums[i];
    if (score == score) sample.push_back(score);
  }
  return sample;
}

template <class T>
T kth(std::vector<T>& values, Index rank) {
  std::nth_element(values.begin(), values.begin() + rank, values.end());
  return values[rank];
}

// Bounds strictly between which the number of some rank of the sample lies, most likely.
template <class T>
void bracket(std::vector<T>& sample, Index rank, double margin, T& low, T& high) {
  const double first = std::floor(rank - margin), last = std::ceil(rank + margin);
  low = -INF<T>, high = INF<T>;
  if (first < 0 || last >= sample.size()) return;
  low = std::nextafter(kth(sample, (Index)first), -INF<T>);
  high = std::nextafter(kth(sample, (Index)last), INF<T>);
}

// The number of some rank among many: as bracket says, with those outside of it left out first.
template <class T>
T select(std::vector<T>& values, Index rank) {
  constexpr size_t many = 1 << 14;
  Random random{values.size()};
  while (values.size() > many) {
    std::vector<T> sample(many / 8);
    for (T& each : sample) each = values[random.below(values.size())];
    T low, high;
    bracket<T>(sample, (double)rank * sample.size() / values.size(), 1.75 * std::sqrt((double)sample.size()), low,
               high);
    Index below = 0, within = 0;
    for (const T each : values) below += each <= low, within += (each > low) & (each < high);
    if (rank < below || rank >= below + within || 2 * within > (Index)values.size()) break;
    std::vector<T> inside(within + 1);
    Index end = 0;
    for (const T each : values) {
      inside[end] = each;
      end += (each > low) & (each < high);
    }
    inside.resize(within);
    values.swap(inside);
    rank -= below;
  }
  return kth(values, rank);
}

// --- threads --------------------------------------------------------------------------------------------------------

// Runs work(task, thread) for all tasks: each thread takes the next one, so that one that is held up takes fewer.
template <class Work>
void in_parallel(const Attention& call, Index tasks, const Work& work) {
  struct Region {
    const Work& work;
    Index tasks;
    std::atomic<Index> next{0};
    std::atomic<Index> threads{0};
    std::atomic<bool> failed{false};

    Region(const Work& work, Index tasks) : work(work), tasks(tasks) {}

    static void enter(void* self) {
      Region& region = *static_cast<Region*>(self);
      const Index thread = region.threads++;
      try {
        for (Index task; !region.failed && (task = region.next++) < region.tasks;) region.work(task, thread);
      } catch (const std::bad_alloc&) {
        region.failed = true;
      }
    }
  } region(work, tasks);
  const Index threads = std::min(call.threads, tasks);
  if (threads > 1)
    call.parallel(&Region::enter, &region, (unsigned)threads, 0);
  else
    Region::enter(&region);  // and no other thread is asked for anything, as in a process that was forked
  if (region.failed) throw std::bad_alloc();
}

// --- the passes -----------------------------------------------------------------------------------------------------

template <class T>
void forward(Attention& call) {
  const Index blocks = blocks_of<T>(call);
  in_parallel(call, call.batch * blocks, [&](Index task, Index) {
    forward_block<T>(call, block_of<T>(call, task / blocks, task % blocks));
  });
}

template <class T>
void backward(Attention& call) {
  double share = 0;
  if (call.ties > 0) {  // the forgotten scores became the threshold, and pass their gradient on to it
    std::vector<double> sums(call.batch);
    in_parallel(call, call.batch, [&](Index item, Index) {
      std::vector<T> delta(call.length);
      Backward<T>::deltas(call, item, 0, call.length, delta.data());
      const T* rho = static_cast<const T*>(call.rho) + item * call.length;
      for (Index q = 0; q < call.length; q++) sums[item] += (double)rho[q] * delta[q];
    });
    for (double each : sums) share -= each / call.ties;
  }
  Backward<T> pass(call, (T)share);
  in_parallel(call, pass.tasks(), [&](Index task, Index) { pass.task(task); });
  if (call.grad_mask && pass.copies_count() > 1)
    in_parallel(call, pass.slices, [&](Index slice, Index) { pass.finish_mask(slice); });
}

template <class T>
void median(Attention& call) {
  const Index blocks = blocks_of<T>(call);
  std::vector<T> sample = draw<T>(call);
  for (double width = 1.75;; width *= 4) {
    T low, high;
    const Index middle = ((Index)sample.size() - 1) / 2;
    bracket<T>(sample, middle, width * std::sqrt((double)sample.size()), low, high);
    const bool flat = std::nextafter(std::nextafter(low, INF<T>), INF<T>) == high;
    std::vector<Found<T>> found(call.threads);
    in_parallel(call, call.batch * blocks, [&](Index task, Index thread) {
      count_block<T>(call, block_of<T>(call, task / blocks, task % blocks), low, high, !flat, found[thread]);
    });
    Found<T> all;
    for (Found<T>& each : found) {
      all.valid += each.valid, all.below += each.below, all.within += each.within, all.nan |= each.nan;
      if (all.values.empty())
        all.values.swap(each.values);
      else
        all.values.insert(all.values.end(), each.values.begin(), each.values.end());
    }
    call.ties = 0;
    call.centre = all.nan ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    if (all.nan || all.valid == 0) return;
    const Index rank = (all.valid - 1) / 2 - all.below;
    if (rank < 0 || rank >= all.within) {
      if (low == -INF<T> && high == INF<T>) {  // which it does not lie strictly between
        call.centre = rank < 0 ? -INF<double> : INF<double>;
        return;
      }
      continue;
    }
    if (flat) {
      call.centre = std::nextafter(low, INF<T>), call.ties = all.within;
      return;
    }
    std::vector<T> values(all.values);
    const T centre = select<T>(values, rank);
    call.centre = centre;
    call.ties = std::count(all.values.begin(), all.values.end(), centre);
    return;
  }
}

template <class T>
void run_forward(Attention& call) {
  if (call.has_mu)
    call.centre = (T)call.mu;
  else
    median<T>(call);
  const T a = (T)call.centre + (T)call.noise;
  call.found[0] = a, call.found[1] = call.centre, call.found[2] = call.ties;
  const bool nan = std::isnan(a);  // then all scores are forgotten, and become NaN
  call.a = nan ? INF<double> : a;
  call.b = nan ? a : call.has_bias ? call.bias : a;
  forward<T>(call);
}

template <class T>
void run_backward(Attention& call) {
  const double a = call.found[0];
  call.a = std::isnan(a) || (!call.has_bias && a == INF<double>) ? -INF<double> : a;  // all is NaN, and stays it
  call.centre = call.found[1];
  call.ties = call.has_mu || call.has_bias ? 0 : (Index)call.found[2];
  backward<T>(call);
}

template <class T>
int run(bool forwards, const Call& given) {
  try {
    Attention call(given);
    if (forwards)
      run_forward<T>(call);
    else
      run_backward<T>(call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace

// Compute the forward or the backward pass. Return whether memory did not suffice.
extern "C" int lwpf_run_float(int forwards, const Call* call) { return run<float>(forwards, *call); }
extern "C" int lwpf_run_double(int forwards, const Call* call) { return run<double>(forwards, *call); }
// How many features a register holds, of which width and value_width must be multiples, in float; half of it in double.
extern "C" int lwpf_lanes() { return BYTES / sizeof(float); }
