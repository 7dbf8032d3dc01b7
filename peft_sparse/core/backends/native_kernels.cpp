// The operations of `native.py`, compiled once on the machine that runs them. Plain C++17 and a C interface, so that no
// header or binary interface of torch is part of it. Each kernel is one inlined body, compiled for several instruction
// sets; `best_level` says which of them this processor has.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAS_LEVELS 1
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define HAS_LEVELS 0
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

// Rows of the batch that are packed at a time: an entry is then one dot product of so many numbers.
constexpr int64_t TILE = 128;
// The longest step of a dot product, in numbers.
constexpr int64_t PADDING = 64;
// Columns that are packed at a time, so that what is written stays in the first cache.
constexpr int64_t BLOCK = 32;
// Tokens that share one pass over the entries in `add_product`.
constexpr int64_t LANES = 16;
// How many entries ahead memory is asked for.
constexpr int64_t AHEAD = 32;

struct bfloat16 { uint16_t bits; };

INLINE float widened(float x) { return x; }
INLINE double widened(double x) { return x; }
INLINE float widened(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE void narrow(float x, float& result) { result = x; }
INLINE void narrow(float x, bfloat16& result) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // To the nearest, ties to even; a NaN stays one, as torch rounds it.
    result.bits = (bits & 0x7fffffffu) > 0x7f800000u
                      ? 0x7fc0
                      : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }
INLINE bool same_bits(bfloat16 a, bfloat16 b) { return a.bits == b.bits; }

template <class S> struct Wide { using type = S; };
template <> struct Wide<bfloat16> { using type = float; };

// [columns][TILE] of [rows][columns]; zeros follow up to the next multiple of PADDING rows.
template <class T, class S>
INLINE void pack_tile(const T* source, int64_t stride, int64_t rows, int64_t columns, S* packed) {
    typedef S quad __attribute__((vector_size(4 * sizeof(S))));
    const int64_t padded = (rows + PADDING - 1) / PADDING * PADDING;
    for (int64_t from = 0; from < columns; from += BLOCK) {
        const int64_t to = from + BLOCK < columns ? from + BLOCK : columns;
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) {
            const T* a = source + row * stride;
            const T *b = a + stride, *c = b + stride, *d = c + stride;
            S* place = packed + row;
            int64_t column = from;
            for (; column + 4 <= to; column += 4) {
                quad r[4];
                for (int i = 0; i < 4; ++i) {
                    r[0][i] = widened(a[column + i]);
                    r[1][i] = widened(b[column + i]);
                    r[2][i] = widened(c[column + i]);
                    r[3][i] = widened(d[column + i]);
                }
                for (int i = 0; i < 4; ++i) {
                    const quad out = {r[0][i], r[1][i], r[2][i], r[3][i]};
                    std::memcpy(place + (column + i) * TILE, &out, sizeof out);
                }
            }
            for (; column < to; ++column) {
                const quad out = {widened(a[column]), widened(b[column]), widened(c[column]), widened(d[column])};
                std::memcpy(place + column * TILE, &out, sizeof out);
            }
        }
        for (; row < padded; ++row)
            for (int64_t column = from; column < to; ++column)
                packed[column * TILE + row] = row < rows ? widened(source[row * stride + column]) : S(0);
    }
}

template <class S, int BYTES>
INLINE S dot(const S* a, const S* b, int64_t length) {
    typedef S vec __attribute__((vector_size(BYTES)));
    constexpr int WIDTH = BYTES / sizeof(S);
    vec sums[4] = {};
    for (int64_t i = 0; i < length; i += 4 * WIDTH)
        for (int j = 0; j < 4; ++j) {
            vec x, y;
            std::memcpy(&x, a + i + j * WIDTH, BYTES);
            std::memcpy(&y, b + i + j * WIDTH, BYTES);
            sums[j] += x * y;
        }
    const vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    S part[WIDTH];
    std::memcpy(part, &all, BYTES);
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

struct Factor {
    const void* data;
    int64_t stride;   // between rows; unused if packed
    int64_t columns;
    bool is_packed;   // [tiles][columns][TILE] in the wide dtype
};

struct Product {
    Factor left, right;
    int64_t rows;
    const void* indices;
    int64_t count;
};

// Adds up tiles [first, last) into `sums`, which starts as zeros.
template <class T, class I, int BYTES>
INLINE void sampled_tiles(const Product& p, int64_t first, int64_t last, typename Wide<T>::type* sums) {
    using S = typename Wide<T>::type;
    const I* indices = static_cast<const I*>(p.indices);
    S* scratch[2] = {nullptr, nullptr};
    const Factor* factors[2] = {&p.left, &p.right};
    for (int side = 0; side < 2; ++side)
        if (!factors[side]->is_packed)
            scratch[side] = static_cast<S*>(std::aligned_alloc(64, factors[side]->columns * TILE * sizeof(S)));
    for (int64_t tile = first; tile < last; ++tile) {
        const S* packed[2];
        const int64_t rows = p.rows - tile * TILE < TILE ? p.rows - tile * TILE : TILE;
        for (int side = 0; side < 2; ++side) {
            const Factor& f = *factors[side];
            if (f.is_packed) {
                packed[side] = static_cast<const S*>(f.data) + tile * f.columns * TILE;
            } else {
                pack_tile<T, S>(static_cast<const T*>(f.data) + tile * TILE * f.stride, f.stride, rows, f.columns, scratch[side]);
                packed[side] = scratch[side];
            }
        }
        const int64_t width = p.right.columns, step = 4 * BYTES / static_cast<int64_t>(sizeof(S));
        const int64_t length = (rows + step - 1) / step * step;
        int64_t begin = 0, end = width;
        const S* row = packed[0];
        for (int64_t e = 0; e < p.count; ++e) {
            const int64_t index = indices[e];
            while (index >= end) {
                begin = end;
                end += width;
                row += TILE;
            }
            sums[e] += dot<S, BYTES>(row, packed[1] + (index - begin) * TILE, length);
        }
    }
    std::free(scratch[0]);
    std::free(scratch[1]);
}

// Where the entries of a product are: what does not change from call to call. `SparseProduct` in `native.py` makes it.
struct Entries {
    const void* indices;
    int64_t count;
    int64_t columns;        // of the weight
    int64_t inputs, outputs;
    int32_t type, is_wide;
    int32_t row_is_output;  // an entry's row is the output's number, and its column the input's
    int32_t level;
};

struct Addition {
    const Entries& entries;
    const void* x;        // [N, inputs]
    int64_t rows;
    const void* weight;   // what the entries are added to
    const float* values;
    void* y;              // [N, outputs], added to
};

// What an entry changes once weight + value is rounded to the weight's dtype.
INLINE float change(const float*, int64_t, float value) { return value; }
INLINE float change(const bfloat16* weight, int64_t index, float value) {
    const float own = widened(weight[index]);
    bfloat16 rounded;
    narrow(own + value, rounded);
    return widened(rounded) - own;
}

INLINE void prefetch_to_change(const float*, int64_t) {}
INLINE void prefetch_to_change(const bfloat16* weight, int64_t index) { __builtin_prefetch(weight + index); }

// One row, whose entries are sorted by outputs: what generating text asks for.
template <class T, class I>
INLINE void add_to_one_row(const Entries& entries, const T* weight, const float* values, const float* inputs, T* y) {
    const I* indices = static_cast<const I*>(entries.indices);
    const int64_t count = entries.count, columns = entries.columns;
    int64_t begin = 0, e = 0;
    for (int64_t row = 0; row < entries.outputs && e < count; ++row, begin += columns) {
        const int64_t end = begin + columns;
        if (indices[e] >= end) continue;
        float sum = 0;
        for (; e < count && indices[e] < end; ++e) {
            if (e + AHEAD < count) prefetch_to_change(weight, indices[e + AHEAD]);
            sum += change(weight, indices[e], values[e]) * inputs[indices[e] - begin];
        }
        narrow(widened(y[row]) + sum, y[row]);
    }
}

INLINE const float* widened_row(const float* x, int64_t, float*) { return x; }
INLINE const float* widened_row(const bfloat16* x, int64_t length, float* into) {
    for (int64_t i = 0; i < length; ++i) into[i] = widened(x[i]);
    return into;
}

template <class T, class I>
INLINE void add_product_body(const Addition& p) {
    const T* x = static_cast<const T*>(p.x);
    const T* weight = static_cast<const T*>(p.weight);
    const I* indices = static_cast<const I*>(p.entries.indices);
    T* y = static_cast<T*>(p.y);
    const int64_t num_inputs = p.entries.inputs, num_outputs = p.entries.outputs, count = p.entries.count;
    const bool single = p.rows == 1, row_is_output = p.entries.row_is_output;
    const int64_t width = single ? 1 : LANES;
    float* inputs = static_cast<float*>(std::aligned_alloc(64, ((num_inputs * width * 4 + 63) / 64) * 64));
    if (single && row_is_output) {
        add_to_one_row<T, I>(p.entries, weight, p.values, widened_row(x, num_inputs, inputs), y);
        std::free(inputs);
        return;
    }
    float* sums = static_cast<float*>(std::aligned_alloc(64, ((num_outputs * width * 4 + 63) / 64) * 64));
    for (int64_t first = 0; first < p.rows; first += width) {
        const int64_t rows = p.rows - first < width ? p.rows - first : width;
        std::memset(sums, 0, num_outputs * width * sizeof(float));
        for (int64_t i = 0; i < num_inputs; ++i) {
            for (int64_t n = 0; n < rows; ++n) inputs[i * width + n] = widened(x[(first + n) * num_inputs + i]);
            for (int64_t n = rows; n < width; ++n) inputs[i * width + n] = 0;
        }
        int64_t begin = 0, end = p.entries.columns, row = 0;
        for (int64_t e = 0; e < count; ++e) {
            const int64_t index = indices[e];
            while (index >= end) {
                begin = end;
                end += p.entries.columns;
                ++row;
            }
            if (e + AHEAD < count) prefetch_to_change(weight, indices[e + AHEAD]);
            const int64_t column = index - begin;
            const float value = change(weight, index, p.values[e]);
            const int64_t from = row_is_output ? column : row, to = row_is_output ? row : column;
            if (single) {
                sums[to] += value * inputs[from];
            } else {
                typedef float vec __attribute__((vector_size(LANES * 4)));
                vec a, b;
                std::memcpy(&a, sums + to * LANES, sizeof a);
                std::memcpy(&b, inputs + from * LANES, sizeof b);
                a += value * b;
                std::memcpy(sums + to * LANES, &a, sizeof a);
            }
        }
        for (int64_t n = 0; n < rows; ++n)
            for (int64_t o = 0; o < num_outputs; ++o) {
                T& place = y[(first + n) * num_outputs + o];
                narrow(widened(place) + sums[o * width + n], place);
            }
    }
    std::free(inputs);
    std::free(sums);
}

// The kernels at one level, by the types of factors and indices.
#define DEFINE_LEVEL(NAME, TARGET, BYTES)                                                                              \
    template <class T, class I>                                                                                        \
    TARGET void sampled_##NAME(const Product& p, int64_t first, int64_t last, typename Wide<T>::type* sums) {          \
        sampled_tiles<T, I, BYTES>(p, first, last, sums);                                                              \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    TARGET void pack_##NAME(const T* source, int64_t stride, int64_t rows, int64_t columns, void* packed) {            \
        using S = typename Wide<T>::type;                                                                              \
        for (int64_t first = 0; first < rows; first += TILE)                                                           \
            pack_tile<T, S>(source + first * stride, stride, rows - first < TILE ? rows - first : TILE, columns,       \
                            static_cast<S*>(packed) + first * columns);                                                \
    }                                                                                                                  \
    template <class T, class I>                                                                                        \
    TARGET void add_product_##NAME(const Addition& p) {                                                                \
        add_product_body<T, I>(p);                                                                                     \
    }

DEFINE_LEVEL(portable, , 16)
#if HAS_LEVELS
DEFINE_LEVEL(avx2, FOR_AVX2, 32)
DEFINE_LEVEL(avx512, FOR_AVX512, 64)
#define AT_LEVEL(LEVEL, KERNEL, TYPES, ...)                                                                            \
    (LEVEL == 2   ? KERNEL##_avx512<TYPES>(__VA_ARGS__)                                                                \
     : LEVEL == 1 ? KERNEL##_avx2<TYPES>(__VA_ARGS__)                                                                  \
                  : KERNEL##_portable<TYPES>(__VA_ARGS__))
#else
#define AT_LEVEL(LEVEL, KERNEL, TYPES, ...) KERNEL##_portable<TYPES>(__VA_ARGS__)
#endif
#define PAIR(A, B) A, B

template <class T, class I>
void sampled(const Product& p, typename Wide<T>::type* sums, int64_t num_threads, int level) {
    using S = typename Wide<T>::type;
    const int64_t tiles = (p.rows + TILE - 1) / TILE;
    std::memset(sums, 0, p.count * sizeof(S));
    // A thread costs some ten microseconds to start.
    const int64_t worth = 1 + p.rows * (p.count + p.left.columns + p.right.columns) / 2000000;
    if (num_threads > worth) num_threads = worth;
    if (num_threads > tiles) num_threads = tiles;
    if (num_threads <= 1) {
        AT_LEVEL(level, sampled, PAIR(T, I), p, 0, tiles, sums);
        return;
    }
    std::vector<std::vector<S>> parts(num_threads - 1, std::vector<S>(p.count));
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < num_threads; ++t)
        threads.emplace_back([&, t] {
            AT_LEVEL(level, sampled, PAIR(T, I), p, tiles * t / num_threads, tiles * (t + 1) / num_threads,
                     parts[t - 1].data());
        });
    AT_LEVEL(level, sampled, PAIR(T, I), p, 0, tiles / num_threads, sums);
    for (int64_t t = 1; t < num_threads; ++t) {
        threads[t - 1].join();
        for (int64_t e = 0; e < p.count; ++e) sums[e] += parts[t - 1][e];
    }
}

template <class T, class I>
int64_t bring_up_to_date(T* weight, const I* indices, int64_t count, const T* originals, const float* values) {
    int64_t changed = 0;
    for (int64_t e = 0; e < count; ++e) {
        // Nearly every entry lies in a cache line of its own.
        if (e + AHEAD < count) __builtin_prefetch(weight + indices[e + AHEAD]);
        T wanted;
        narrow(widened(originals[e]) + values[e], wanted);
        T& place = weight[indices[e]];
        if (!same_bits(place, wanted)) {
            place = wanted;
            ++changed;
        }
    }
    return changed;
}

template <class T, class I>
void take(const T* from, const I* indices, int64_t count, T* to) {
    for (int64_t e = 0; e < count; ++e) {
        if (e + AHEAD < count) __builtin_prefetch(from + indices[e + AHEAD]);
        to[e] = from[indices[e]];
    }
}

template <class T, class I>
void put(T* to, const I* indices, int64_t count, const T* from) {
    for (int64_t e = 0; e < count; ++e) {
        if (e + AHEAD < count) __builtin_prefetch(to + indices[e + AHEAD], 1);
        to[indices[e]] = from[e];
    }
}

// Entries of one of the weights that are written into at once; each member has the width of an int64 in `native.py`.
struct Piece {
    void* weight;
    const void* indices;
    int64_t count;
    void* originals;
    const float* values;
    int64_t type, is_wide;
};

template <class T, class I>
struct Entry {
    T* weight;
    const I* indices;
    T* originals;

    explicit Entry(const Piece& p)
        : weight(static_cast<T*>(p.weight)), indices(static_cast<const I*>(p.indices)),
          originals(static_cast<T*>(p.originals)) {}

    void fetch(int64_t e) const { __builtin_prefetch(weight + indices[e], 1); }
};

// The first entries of a piece: the loop over the one before it asks for no more than its own.
template <class T, class I>
void fetch_first(const Piece& p) {
    const Entry<T, I> entry(p);
    for (int64_t e = 0; e < p.count && e < AHEAD; ++e) entry.fetch(e);
}

// Keeps what is there and writes what it is with the values; returns whether all of that is finite.
template <class T, class I>
bool keep_and_write(const Piece& p) {
    const Entry<T, I> entry(p);
    bool finite = true;
    for (int64_t e = 0; e < p.count; ++e) {
        if (e + AHEAD < p.count) entry.fetch(e + AHEAD);
        T& place = entry.weight[entry.indices[e]];
        T wanted;
        narrow(widened(place) + p.values[e], wanted);
        entry.originals[e] = place;
        place = wanted;
        const float written = widened(wanted);
        finite &= written - written == 0;
    }
    return finite;
}

template <class T, class I>
void write_back(const Piece& p) {
    const Entry<T, I> entry(p);
    for (int64_t e = 0; e < p.count; ++e) {
        if (e + AHEAD < p.count) entry.fetch(e + AHEAD);
        entry.weight[entry.indices[e]] = entry.originals[e];
    }
}

// Positions and values of the numbers that reach a threshold, up to `most` of them; returns how many reach it, -1 if one
// is NaN.
template <class I>
int64_t above(const float* numbers, int64_t count, float threshold, int64_t most, I* positions, float* values) {
    int64_t found = 0;
    bool is_nan = false;
    for (int64_t e = 0; e < count; ++e) {
        is_nan |= numbers[e] != numbers[e];
        if (numbers[e] < threshold) continue;
        if (found < most) {
            positions[found] = static_cast<I>(e);
            values[found] = numbers[e];
        }
        ++found;
    }
    return is_nan ? -1 : found;
}

// SM3's accumulators of a matrix, and the gradients of some of its entries; each member is an int64 in `native.py`.
struct Cover {
    const float* gradients;
    float* rows;
    int64_t num_rows;
    float* columns;
    int64_t num_columns;
    const void* indices;
    int64_t count;
    float* estimates;  // may be null
    int64_t is_wide;
};

inline bool has_nan(const float* numbers, int64_t count) {
    bool found = false;
    for (int64_t e = 0; e < count; ++e) found |= numbers[e] != numbers[e];
    return found;
}

// Returns false, and has changed nothing, if an index is beyond the matrix or something is NaN: torch knows what to make
// of that.
template <class I>
bool cover(const Cover& p) {
    const I* indices = static_cast<const I*>(p.indices);
    I least = 0, most = -1;
    for (int64_t e = 0; e < p.count; ++e) {
        least = indices[e] < least ? indices[e] : least;
        most = indices[e] > most ? indices[e] : most;
    }
    if (least < 0 || most >= p.num_rows * p.num_columns) return false;
    if (has_nan(p.gradients, p.count) || has_nan(p.rows, p.num_rows) || has_nan(p.columns, p.num_columns)) return false;
    // All estimates are of the accumulators as they were before this update.
    const std::vector<float> rows(p.rows, p.rows + p.num_rows), columns(p.columns, p.columns + p.num_columns);
    for (int64_t e = 0; e < p.count;) {
        const int64_t row = indices[e] / p.num_columns, start = row * p.num_columns;
        const float of_row = rows[row];
        float most_of_row = of_row;
        for (; e < p.count && indices[e] >= start && indices[e] < start + p.num_columns; ++e) {
            const int64_t column = indices[e] - start;
            const float of_column = columns[column];
            const float estimate = (of_column < of_row ? of_column : of_row) + p.gradients[e] * p.gradients[e];
            if (p.estimates) p.estimates[e] = estimate;
            most_of_row = estimate > most_of_row ? estimate : most_of_row;
            const float before = p.columns[column];
            p.columns[column] = estimate > before ? estimate : before;
        }
        if (most_of_row > p.rows[row]) p.rows[row] = most_of_row;
    }
    return true;
}

// What memory held at a time.
struct Image {
    const void* values;
    int64_t size;         // of them, in bytes
    const int64_t* places;
    const void* entries;  // of a weight, at `places`
    int64_t num_places;
    int64_t width;        // of an entry, in bytes
};

// The sum of factor * value at a place of the union, from the least to the greatest; a list that lacks it counts as zero.
template <class I>
double ordered_sum(int64_t num, const I* heads, I place, const int64_t* at, const float* const* values,
                   const double* factors, double* terms) {
    for (int64_t n = 0; n < num; ++n) {
        const double term = (heads[n] == place ? values[n][at[n]] : 0.0) * factors[n];
        int64_t where = n;
        for (; where > 0 && terms[where - 1] > term; --where) terms[where] = terms[where - 1];
        terms[where] = term;
    }
    double total = terms[0];
    for (int64_t n = 1; n < num; ++n) total += terms[n];
    return total;
}

// Merges sorted lists, and adds up their values at each place of the union; without values it only unites.
template <class I>
int64_t merge(int64_t num, const I* const* lists, const int64_t* counts, const float* const* values,
              const double* factors, I* united, float* sums) {
    // No index is as large: a tensor that has it as one is indexed by a wider type.
    constexpr I END = std::numeric_limits<I>::max();
    std::vector<int64_t> at(num, 0);
    std::vector<I> heads(num);
    std::vector<double> terms(num);
    for (int64_t n = 0; n < num; ++n) heads[n] = counts[n] ? lists[n][0] : END;
    int64_t length = 0;
    for (;; ++length) {
        I least = heads[0];
        for (int64_t n = 1; n < num; ++n) least = heads[n] < least ? heads[n] : least;
        if (least == END) return length;
        united[length] = least;
        int64_t owners = 0, owner = 0;
        for (int64_t n = 0; n < num; ++n)
            if (heads[n] == least) {
                owner = n;
                ++owners;
            }
        if (values) {
            const double alone = values[owner][at[owner]] * factors[owner];
            // Zeros of the others change nothing but the sign of a zero.
            const bool is_sum = owners == 1 && alone != 0;
            sums[length] = static_cast<float>(
                is_sum ? alone : ordered_sum(num, heads.data(), least, at.data(), values, factors, terms.data()));
        }
        if (owners == 1) {
            heads[owner] = ++at[owner] < counts[owner] ? lists[owner][at[owner]] : END;
            continue;
        }
        for (int64_t n = 0; n < num; ++n)
            if (heads[n] == least) heads[n] = ++at[n] < counts[n] ? lists[n][at[n]] : END;
    }
}

}  // namespace

// Types: 0 float32, 1 float64, 2 bfloat16. Levels: 0 portable, 1 AVX2, 2 AVX-512.
#define BY_INDEX(IS_WIDE, CALL)                                                                                        \
    {                                                                                                                  \
        if (IS_WIDE) {                                                                                                 \
            using I = int64_t;                                                                                         \
            CALL;                                                                                                      \
        } else {                                                                                                       \
            using I = int32_t;                                                                                         \
            CALL;                                                                                                      \
        }                                                                                                              \
    }

extern "C" {

int peft_sparse_best_level() {
#if HAS_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int64_t peft_sparse_tile() { return TILE; }

void peft_sparse_pack(int type, const void* source, int64_t stride, int64_t rows, int64_t columns, void* packed,
                      int level) {
    if (type == 0) AT_LEVEL(level, pack, float, static_cast<const float*>(source), stride, rows, columns, packed);
    if (type == 1) AT_LEVEL(level, pack, double, static_cast<const double*>(source), stride, rows, columns, packed);
    if (type == 2) AT_LEVEL(level, pack, bfloat16, static_cast<const bfloat16*>(source), stride, rows, columns, packed);
}

void peft_sparse_sampled(int type, const void* left, int64_t left_stride, int64_t left_columns, int left_is_packed,
                         const void* right, int64_t right_stride, int64_t right_columns, int right_is_packed,
                         int64_t rows, const void* indices, int is_wide, int64_t count, void* sums, int64_t num_threads,
                         int level) {
    const Product p = {{left, left_stride, left_columns, left_is_packed != 0},
                       {right, right_stride, right_columns, right_is_packed != 0},
                       rows, indices, count};
    if (type == 0) BY_INDEX(is_wide, (sampled<float, I>(p, static_cast<float*>(sums), num_threads, level)))
    if (type == 1) BY_INDEX(is_wide, (sampled<double, I>(p, static_cast<double*>(sums), num_threads, level)))
    if (type == 2) BY_INDEX(is_wide, (sampled<bfloat16, I>(p, static_cast<float*>(sums), num_threads, level)))
}

void peft_sparse_add_product(const Entries* entries, const void* x, int64_t rows, void* y, const void* weight,
                             const float* values) {
    const Addition p = {*entries, x, rows, weight, values, y};
    if (entries->type == 0)
        BY_INDEX(entries->is_wide, (AT_LEVEL(entries->level, add_product, PAIR(float, I), p)))
    if (entries->type == 2)
        BY_INDEX(entries->is_wide, (AT_LEVEL(entries->level, add_product, PAIR(bfloat16, I), p)))
}

int64_t peft_sparse_bring_up_to_date(int type, void* weight, const void* indices, int is_wide, int64_t count,
                                     const void* originals, const float* values) {
    int64_t changed = 0;
    if (type == 0)
        BY_INDEX(is_wide,
                 (changed = bring_up_to_date<float, I>(static_cast<float*>(weight), static_cast<const I*>(indices),
                                                       count, static_cast<const float*>(originals), values)))
    if (type == 2)
        BY_INDEX(is_wide,
                 (changed = bring_up_to_date<bfloat16, I>(static_cast<bfloat16*>(weight),
                                                          static_cast<const I*>(indices), count,
                                                          static_cast<const bfloat16*>(originals), values)))
    return changed;
}

#define OF_PIECE(CALL, P)                                                                                              \
    ((P).type == 0 ? ((P).is_wide ? CALL<float, int64_t>(P) : CALL<float, int32_t>(P))                                 \
                   : ((P).is_wide ? CALL<bfloat16, int64_t>(P) : CALL<bfloat16, int32_t>(P)))

int peft_sparse_keep_and_write(int64_t num, const Piece* pieces) {
    bool finite = true;
    for (int64_t n = 0; n < num; ++n) {
        if (n + 1 < num) OF_PIECE(fetch_first, pieces[n + 1]);
        finite &= OF_PIECE(keep_and_write, pieces[n]);
    }
    return finite;
}

void peft_sparse_write_back(int64_t num, const Piece* pieces) {
    for (int64_t n = 0; n < num; ++n) {
        if (n + 1 < num) OF_PIECE(fetch_first, pieces[n + 1]);
        OF_PIECE(write_back, pieces[n]);
    }
}

int64_t peft_sparse_above(const float* numbers, int64_t count, float threshold, int64_t most, void* positions,
                          int is_wide, float* values) {
    if (is_wide) return above<int64_t>(numbers, count, threshold, most, static_cast<int64_t*>(positions), values);
    return above<int32_t>(numbers, count, threshold, most, static_cast<int32_t*>(positions), values);
}

// Returns how many of the matrices were brought up to date: all, or those before the first that cannot be.
int64_t peft_sparse_cover(int64_t num, const Cover* covers) {
    for (int64_t n = 0; n < num; ++n)
        if (!(covers[n].is_wide ? cover<int64_t>(covers[n]) : cover<int32_t>(covers[n]))) return n;
    return num;
}

// Entries of a tensor whose elements are 2, 4 or 8 bytes wide, out of it and into it.
void peft_sparse_take(int width, const void* from, const void* indices, int is_wide, int64_t count, void* to) {
#define TAKE(T) BY_INDEX(is_wide, (take<T, I>(static_cast<const T*>(from), static_cast<const I*>(indices), count, static_cast<T*>(to))))
    if (width == 2) TAKE(uint16_t)
    if (width == 4) TAKE(uint32_t)
    if (width == 8) TAKE(uint64_t)
}

void peft_sparse_put(int width, void* to, const void* indices, int is_wide, int64_t count, const void* from) {
#define PUT(T) BY_INDEX(is_wide, (put<T, I>(static_cast<T*>(to), static_cast<const I*>(indices), count, static_cast<const T*>(from))))
    if (width == 2) PUT(uint16_t)
    if (width == 4) PUT(uint32_t)
    if (width == 8) PUT(uint64_t)
}

int64_t peft_sparse_merge(int64_t num, const void* const* lists, const int64_t* counts, int is_wide,
                          const float* const* values, const double* factors, void* united, float* sums) {
    if (is_wide)
        return merge<int64_t>(num, reinterpret_cast<const int64_t* const*>(lists), counts, values, factors,
                              static_cast<int64_t*>(united), sums);
    return merge<int32_t>(num, reinterpret_cast<const int32_t* const*>(lists), counts, values, factors,
                          static_cast<int32_t*>(united), sums);
}

// Whether memory is what it was when a `BitwiseComparison` (prepared_calls.py) was made: values, entries of a weight.
int peft_sparse_unchanged(const Image* image, const void* values, const void* weight) {
    const char *now = static_cast<const char*>(values), *before = static_cast<const char*>(image->values);
    const char *own = static_cast<const char*>(weight), *entries = static_cast<const char*>(image->entries);
    const int64_t width = image->width, page = 4096;
    // Nothing of it is in a cache, and processors fetch ahead within a page alone.
    for (int64_t i = 0; i < image->num_places; ++i) __builtin_prefetch(own + image->places[i] * width);
    for (int64_t at = 0; at < image->size; at += page) {
        for (int64_t next = at + page; next < at + 2 * page && next < image->size; next += 64) {
            __builtin_prefetch(now + next);
            __builtin_prefetch(before + next);
        }
        if (std::memcmp(now + at, before + at, image->size - at < page ? image->size - at : page) != 0) return 0;
    }
    for (int64_t i = 0; i < image->num_places; ++i)
        if (std::memcmp(own + image->places[i] * width, entries + i * width, width) != 0) return 0;
    return 1;
}

}  // extern "C"
