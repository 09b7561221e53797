// The GPU's row kernels on this machine, against sums in double: a program that checks itself, to be built with thread
// and address sanitizers, too. GSPO_FEW: the shapes that every barrier and every branch matters in, of bfloat16 or of
// GSPO_TYPE, for mutants and sanitizers.
#include "../../../csrc/cuda/rows.cuh"

#include <algorithm>
#include <cstdio>
#include <type_traits>

using namespace gspo;
using namespace gspo::gpu;

namespace {

constexpr int kThreads = 96;  // three warps: every barrier matters, and no power of two, as in rows.cu

// What there is about a row; a case has one of each, or rows that are all plain with targets of their own.
enum Kind {
  kFirstColumn,
  kLastColumn,
  kNoGradient,
  kMasked,  // of NaN, with no token
  kHeld,
  kSomeInfinite,
  kNearlyAllInfinite,
  kTargetInfinite,
  kAllInfinite,
  kNaN,
  kUnknownToken,
  kHeldTwice,  // by the dual clip, if there is one
  kFarAway,    // by max_log_ratio
  kTies,       // several logits, one of them the target's, are the largest finite number of the dtype
  kLargest,    // one that is not the target
  kLargestTarget,
  kMostNegative,  // all of them, and some but the target a little less
  kBothEnds,      // the largest and the most negative ones; the target is one of these
  kBillions,      // where float begins to have no neighbours nearer than 64
  kMinusBillions,
  kKinds,
  kPlain
};

enum Of { kAgain, kResident };  // sources, as in rows.cu
const char* const kNames[] = {"again", "resident"};
const std::vector<Of> kChecked = {kAgain, kResident};

struct Case {
  Of of;
  unsigned clusters, ranks;
  int64_t vocab;
  int shift;       // columns' worth of memory between a boundary and the first row
  bool over;       // the gradient lies over the logits
  bool elsewhere;  // it lies otherwise to the boundaries than they do
  bool clip, temperatures;
  double dual_clip;
  std::vector<int64_t> targets;
  float offset = 0.0f;  // of all logits
  double cap = 0.0;     // logits are cap * tanh(x / cap); 0: they are x
  bool pairs = false;   // all but two logits of a plain row are far below: nothing averages their errors
};

double random_number() {  // -1 to 1, the same every time
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0;
}

int failures = 0;

void expect(bool right, const char* what, const std::string& where) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "%s is wrong: %s\n", what, where.c_str());
}

bool near(double found, double expected, double relative, double absolute) {
  if (std::isnan(expected)) return std::isnan(found);
  if (std::isinf(expected)) return found == expected;
  return std::fabs(found - expected) <= relative * std::fabs(expected) + absolute;
}

double finite(double x) { return x > 1e30 ? 1e30 : x < -1e30 ? -1e30 : x; }

[[maybe_unused]] float largest_of(float) { return 3.4028235e38f; }
[[maybe_unused]] float largest_of(BFloat16) { return 3.3895314e38f; }
[[maybe_unused]] float largest_of(Float16) { return 65504.0f; }

[[maybe_unused]] const char* name_of(float) { return "float32"; }
[[maybe_unused]] const char* name_of(BFloat16) { return "bfloat16"; }
[[maybe_unused]] const char* name_of(Float16) { return "float16"; }

std::string words(const Case& c) {
  const auto number = [](auto x) { return std::to_string(x); };
  return std::string(", ") + kNames[c.of] + ", " + number(c.clusters) + " clusters of " + number(c.ranks) + ", V = " + number(c.vocab) + ", shift " + number(c.shift) + (c.over ? ", in place" : "") +
         (c.elsewhere ? ", elsewhere" : "") + (c.clip ? c.over ? ", clipped by TV" : ", clipped" : "") + (c.dual_clip < 1e9 ? " twice" : "") +
         (c.temperatures ? ", temperatures" : "") + (c.cap != 0.0 ? ", capped" : "");
}

template <class T>
size_t buffer_bytes(int64_t vocab, unsigned ranks) {  // of a slice that begins as late as one can, and not a byte more
  const Slice<T> first(reinterpret_cast<const T*>(16 - sizeof(T)), vocab, -1, 0, ranks);
  return first.span.vectors * sizeof(Vector);
}

// What a row should come to.
struct Truth {
  double lse, logprob, entropy = 0.0;
  std::vector<double> p, slope;  // slope: of the cap

  template <class T>
  Truth(const T* x, int64_t vocab, int64_t token, double temperature, double cap)
      : p(vocab), slope(vocab, 1.0) {
    double top = -INFINITY, sum = 0.0;
    const auto logit = [&](int64_t v) { return cap == 0.0 ? widen(x[v]) : cap * std::tanh(widen(x[v]) / cap); };
    for (int64_t v = 0; v < vocab; ++v) top = std::fmax(top, logit(v));
    const auto below_top = [&](int64_t v) { return (logit(v) - top) / temperature; };
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(below_top(v));
    const bool known = token >= 0 && token < vocab;
    const bool nothing = cap == 0.0 && std::all_of(x, x + vocab, [](T one) { return widen(one) == -INFINITY; });
    const double log_sum = std::log(sum);
    lse = !known ? NAN : nothing ? -INFINITY : top / temperature + log_sum;
    logprob = known ? below_top(token) - log_sum : NAN;
    for (int64_t v = 0; v < vocab; ++v) {
      const double log_p = below_top(v) - log_sum;
      p[v] = known ? std::exp(log_p) : NAN;
      if (p[v] != 0.0) entropy -= p[v] * log_p;
      const double e = std::exp(-2.0 * std::fabs(widen(x[v]) / cap));
      if (cap != 0.0) slope[v] = 4.0 * e / ((1.0 + e) * (1.0 + e));
    }
  }
};

template <class T>
void check(const Case& c) {
  constexpr double kStep = sizeof(T) == 4 ? 0x1p-22 : 0x1p-7;
  const bool plain = !c.targets.empty();
  const int64_t rows = plain ? static_cast<int64_t>(c.targets.size()) : int64_t{kKinds};
  const int64_t inner = plain ? 1 : 4, vocab = c.vocab;
  const int64_t stride = vocab + 1 + c.shift, outer_stride = inner * stride + 16;
  const int64_t size = (rows + inner - 1) / inner * outer_stride;
  // By the byte, so that an access beyond a row is one beyond the memory.
  std::vector<T> logits(size + c.shift + 1), gradients(size + c.shift + 1, narrow(NAN, T{}));
  const auto place = [&](int64_t r) { return r / inner * outer_stride + r % inner * stride; };
  T* const x = logits.data() + c.shift;
  T* const g = c.over ? x : gradients.data() + c.shift + (c.elsewhere ? 1 : 0);
  for (T& one : logits) one = narrow(c.offset + static_cast<float>(3.0 * random_number()), T{});

  std::vector<int64_t> tokens(rows);
  const auto mask = std::make_unique<bool[]>(rows);
  std::vector<float> upstream(rows), old(rows), rollout(rows), advantages(rows), temperatures(rows);
  std::vector<double> temperature(rows);  // before it was divided by the cap
  const double divisor = c.cap == 0.0 ? 1.0 : c.cap;
  std::vector<Truth> truth;
  for (int64_t r = 0; r < rows; ++r) {
    const int kind = plain ? kPlain : static_cast<int>(r);
    T* const row = x + place(r);
    int64_t& token = tokens[r];
    token = plain                  ? c.targets[r]
            : kind == kFirstColumn ? 0
            : kind == kLastColumn  ? vocab - 1
                                   : static_cast<int64_t>((random_number() + 1.0) / 2.0 * vocab) % vocab;
    row[(token + 11) % vocab] = narrow(c.offset + 9.0f, T{});
    if (plain) row[token] = narrow(c.offset + 8.0f, T{});
    if (c.pairs) {
      std::fill(row, row + vocab, narrow(-1e4f, T{}));
      row[token] = narrow(static_cast<float>(45.0 * random_number()), T{});
      row[(token + 11) % vocab] = narrow(widen(row[token]) + static_cast<float>(random_number()), T{});
    }
    const auto make_infinite = [&](double share) {
      for (int64_t v = 0; v < vocab; ++v)
        if (v != token && random_number() < 2.0 * share - 1.0) row[v] = minus_infinity(T{});
    };
    if (kind == kSomeInfinite) make_infinite(0.1);
    if (kind == kNearlyAllInfinite) make_infinite(0.99);
    if (kind == kTargetInfinite) row[token] = minus_infinity(T{});
    if (kind == kAllInfinite) std::fill(row, row + vocab, minus_infinity(T{}));
    if (kind == kNaN) row[vocab / 2] = narrow(NAN, T{});
    if (kind == kMasked) std::fill(row, row + vocab, narrow(NAN, T{}));
    if (kind == kMasked) token = -1;
    if (kind == kUnknownToken) token = vocab;
    const T most = narrow(largest_of(T{}), T{}), least = narrow(-largest_of(T{}), T{});
    if (kind == kMostNegative || kind == kBothEnds) std::fill(row, row + vocab, least);
    for (int64_t v = 0; v < vocab; ++v) {  // of every fifth column, of every fifth from the target on
      const bool of_few = (v + 5 * vocab - token) % 5 == 0;
      if ((kind == kTies && of_few) || (kind == kBothEnds && v % 5 == 0 && v != token)) row[v] = most;
      if (kind == kMostNegative && of_few && v != token) row[v] = narrow(0.99f * widen(least), T{});
      if (kind == kBillions || kind == kMinusBillions) {
        const float number = 1.2e9f + 64.0f * static_cast<int>(3.0 * random_number());
        row[v] = narrow(kind == kBillions ? number : -number, T{});
      }
    }
    if (kind == kLargest) row[(token + 11) % vocab] = most;
    if (kind == kLargestTarget) row[token] = most;
    mask[r] = kind != kMasked;
    advantages[r] = kind == kHeld || r % 2 == 0 ? 1.0f : -1.0f;
    if (kind == kHeldTwice || kind == kFarAway) advantages[r] = -1.0f;
    upstream[r] = kind == kNoGradient ? 0.0f : c.clip ? 0.37f : -0.37f * advantages[r];
    const bool coldest = c.cap == 0.0 && (kind == kTies || kind == kMostNegative);
    const bool hottest = c.cap == 0.0 && (kind == kBothEnds || kind == kLargest);
    temperatures[r] = static_cast<float>((coldest ? 1e-6f : hottest ? 1e6f : 0.7f + 0.2f * (r % 5)) / divisor);
    temperature[r] = (c.temperatures ? temperatures[r] : 1.3 / divisor) * divisor;
    truth.emplace_back(row, vocab, token, temperature[r], c.cap);
    const double log_ratio = kind == kHeld ? 0.05 : kind == kHeldTwice ? 1.5 : kind == kFarAway ? 2.5 : -0.01;
    rollout[r] = static_cast<float>(kind == kHeld ? std::log(std::exp(truth[r].logprob) + 0.1) : truth[r].logprob);
    old[r] = kind == kTargetInfinite ? (c.over ? -INFINITY : -3.0f) : static_cast<float>(truth[r].logprob - log_ratio);
  }

  std::vector<T>& written = c.over ? logits : gradients;
  const std::vector<T> before = written;
  std::vector<float> out_logprobs(rows), out_entropy(rows);
  std::vector<double> out_lse(rows);
  float factor = 0.5f, counts[] = {1.0f, 2.0f, 1.0f};
  unsigned tickets = 0;
  OneRead args{};
  args.shape = {rows, inner, vocab};
  args.in = {{reinterpret_cast<char*>(x), outer_stride, stride}, tokens.data(), mask.get(),
             c.temperatures ? temperatures.data() : nullptr,     1.3 / divisor, nullptr,
             c.cap == 0.0 ? 0.0 : 1.0 / c.cap};
  args.out = {out_logprobs.data(), out_entropy.data(), out_lse.data()};
  args.upstream = {upstream.data(), nullptr, nullptr};
  args.common = {&factor, counts, 3};
  args.slope = {c.clip ? old.data() : nullptr, advantages.data(),          nullptr,
                {-INFINITY, 0.04},             {-0.04, c.dual_clip - 1.0}, false,
                Measure::kRatio,               INFINITY,                   0.0,     2.0};
  const bool by_tv = c.clip && c.over;  // for advantages of both signs from -0.04 on
  if (by_tv) {
    args.slope.rollout_logprobs = rollout.data();
    args.slope.measure = Measure::kTv;
    args.slope.positive = args.slope.negative = {-0.04, INFINITY};
  }
  args.gradient = {reinterpret_cast<char*>(g), outer_stride, stride};
  args.tickets = &tickets;
  on_host::launch(c.clusters, c.ranks, kThreads, c.of == kAgain ? 0 : buffer_bytes<T>(vocab, c.ranks), [&] {
    if (c.of == kAgain && c.cap == 0.0) one_read<T, Again<T, kThreads>, NoCap, 1>(args);
    if (c.of == kAgain && c.cap != 0.0) one_read<T, Again<T, kThreads>, TanhCap, 1>(args);
    if (c.of == kResident && c.cap == 0.0) one_read<T, Resident<T, kThreads>, NoCap, 1>(args);
    if (c.of == kResident && c.cap != 0.0) one_read<T, Resident<T, kThreads>, TanhCap, 1>(args);
  });

  for (int64_t r = 0; r < rows; ++r) {
    const std::string where = name_of(T{}) + words(c) + ", row " + std::to_string(r);
    const Truth& t = truth[r];
    double coefficient = mask[r] && upstream[r] != 0.0f ? -0.37f * advantages[r] * 0.125 : 0.0;
    if (c.clip && coefficient != 0.0) {
      const double log_ratio = finite(static_cast<float>(t.logprob)) - finite(old[r]);
      const double deviation = std::expm1(log_ratio);
      const double difference = std::exp(t.logprob) - std::exp(std::fmin(rollout[r], 0.0));
      const bool held = by_tv                ? difference < -0.04
                        : advantages[r] > 0 ? deviation > 0.04
                                            : deviation < -0.04 || deviation > c.dual_clip - 1.0;
      coefficient = held || log_ratio > 2.0 ? 0.0 : coefficient * (1.0 + deviation);
    }
    if (mask[r]) {
      const double error = c.cap == 0.0 ? 2e-6 : c.pairs ? 1.6e-7 : 5e-7;
      expect(near(out_logprobs[r], static_cast<float>(t.logprob), error, error), "logprob", where);
      expect(near(out_entropy[r], t.entropy, 4e-6, 4e-6), "entropy", where);
      expect(near(out_lse[r], t.lse, 1e-6, 1e-6), "lse", where);
    } else {
      expect(out_logprobs[r] == 0.0f && out_entropy[r] == 0.0f && out_lse[r] == 0.0, "a masked row", where);
    }
    const double least = std::is_same<T, Float16>::value ? 6e-8 : 1e-15;
    bool right = true;
    for (int64_t v = 0; v < vocab && right; ++v) {
      const double expected =
          coefficient == 0.0 ? 0.0 : coefficient * ((v == tokens[r]) - t.p[v]) * t.slope[v] / temperature[r];
      right = near(widen(g[place(r) + v]), expected, kStep + 4e-6, coefficient == 0.0 ? 0.0 : least);
      expect(right, "gradient", where + ", column " + std::to_string(v));
    }
    std::copy_n(before.data() + (g - written.data()) + place(r), vocab, g + place(r));
  }
  expect(std::memcmp(before.data(), written.data(), before.size() * sizeof(T)) == 0, "memory beside the rows",
         name_of(T{}) + words(c));
}

// Rows of every kind, of lengths with and without whole vectors and with blocks that have no column.
template <class T>
void check_kinds(const std::vector<int64_t>& vocabs) {
  for (const int64_t vocab : vocabs)
    for (const int shift : {0, 5, 6})  // 6: rows that lie alike, for vocabularies of 33 and 601
      for (const bool over : {false, true})
        for (const bool clip : {false, true}) {
          const bool elsewhere = clip && !over;
          const double dual_clip = over ? INFINITY : 3.0;
          for (const Of of : kChecked) {
            if (of == kAgain) {
              check<T>({of, 2, 1, vocab, shift, over, elsewhere, clip, shift == 0, dual_clip, {}});
              continue;
            }
            check<T>({of, 1, 4, vocab, shift, over, elsewhere, clip, shift != 5, dual_clip, {}});
            check<T>({of, 2, 2, vocab, shift, over, elsewhere, clip, shift == 5, dual_clip, {}});
          }
        }
}

// Capped rows of every kind, and where logits lie about the cap and far beyond it.
template <class T>
void check_capped() {
  for (const double cap : {30.0, 0.5})
    for (const Of of : kChecked)
      for (const int shift : {0, 5}) {
        const unsigned ranks = of == kAgain ? 1 : 2;
        check<T>({of, 2, ranks, 601, shift, shift == 0, false, cap < 1.0, shift != 0, 3.0, {}, 0.0f, cap});
        check<T>({of, 2, ranks, 601, shift, shift != 0, shift == 0, false, false, 3.0, {0, 50, 600}, 25.0f, cap});
      }
  std::vector<int64_t> targets(100);
  for (int64_t& target : targets) target = 90 + (&target - targets.data());
  check<T>({kResident, 2, 2, 601, 0, false, false, false, false, 3.0, targets, 0.0f, 30.0, true});
  const int64_t group = 8 * kThreads * Columns<T>::kWidth, vocab = 3 * group + 70 * Columns<T>::kWidth + 3;
  for (const Of of : kChecked)
    check<T>({of, 2, of == kAgain ? 1u : 2u, vocab, 3, false, true, true, false, INFINITY,
              {9, group / 2, group + 77, 3 * group + 8, vocab - 90, vocab - 1}, -20.0f, 30.0});
}

// Several vectors at a time: three times as many columns as that takes, and some, with the target in each part.
template <class T>
void check_groups() {
  for (const Of of : kChecked) {
    const int vectors = of == kAgain ? Again<T, kThreads>::kGroup : Resident<T, kThreads>::kGroup;
    const unsigned ranks = of == kAgain ? 1 : kFewestBlocks;
    const int64_t group = vectors * kThreads * Columns<T>::kWidth * ranks;
    const int64_t vocab = 3 * group + 70 * Columns<T>::kWidth + 3;
    check<T>({of, 2, ranks, vocab, 3, false, true, true, false, INFINITY,
              {9, group / 2, group + 77, 3 * group - 20, 3 * group + 8, vocab - 90, vocab - 1}});
    check<T>({of, 2, ranks, vocab, 4, true, false, true, false, INFINITY,
              {9, group + 77, vocab - 90, vocab - 1, 0, 8}});
  }
}

}  // namespace

int main() {
#if defined(GSPO_FEW)
#if !defined(GSPO_TYPE)
#define GSPO_TYPE BFloat16
#endif
  check_kinds<GSPO_TYPE>({33, 601});
  check_groups<GSPO_TYPE>();
  check_capped<GSPO_TYPE>();
  check<GSPO_TYPE>({kResident, 2, 2, 601, 1, false, false, false, true, INFINITY, {50, 99}, 1000.0f});
#else
  check_kinds<BFloat16>({1, 7, 33, 601});
  check_kinds<float>({1, 7, 33, 601});
  check_kinds<Float16>({1, 7, 33, 601});
  check_groups<BFloat16>();
  check_groups<float>();
  check_groups<Float16>();
  check_capped<BFloat16>();
  check_capped<float>();
  check_capped<Float16>();
  const double infinity = INFINITY;
  for (const Of of : kChecked) {
    if (of != kAgain) check<float>({of, 2, 2, 601, 1, false, false, false, true, infinity, {50, 99}, 1000.0f});
    const unsigned ranks = of == kAgain ? 1 : 2;  // more clusters than rows
    check<BFloat16>({of, 5, ranks, 100, 1, false, false, true, true, infinity, {50, 99}});
  }
#endif
  std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
