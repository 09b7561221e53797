// The GPU's row kernels on this machine's threads, against sums in double: a program that checks itself, to be built
// with thread and address sanitizers, too.
#include "../../csrc/cuda/rows.cuh"

#include <cstdio>
#include <string>

using namespace gspo;
using namespace gspo::gpu;

namespace {

constexpr int kThreads = 64;  // two warps: enough for every barrier to matter

template <class T>
size_t room_bytes(int64_t vocab, unsigned ranks) {  // as the launcher counts it
  const Slice<T> first(reinterpret_cast<const T*>(16 - sizeof(T)), vocab, -1, 0, ranks);
  return first.span.vectors * sizeof(Vector);
}

template <class T>
void run(bool resident, unsigned clusters, unsigned ranks, const OneRead& args) {
  const size_t bytes = resident ? room_bytes<T>(args.shape.vocab, ranks) : 0;
  on_host::launch(clusters, ranks, kThreads, sizeof(Shared<kThreads>), bytes, [&] {
    if (resident)
      one_read<T, Resident, kThreads>(args);
    else
      one_read<T, Again, kThreads>(args);
  });
}

}  // namespace

namespace {

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

template <class T>
void check(const char* name, bool resident, unsigned clusters, unsigned ranks, int64_t vocab, int shift, bool over,
           bool clip) {
  constexpr double kStep = sizeof(T) == 4 ? 0x1p-22 : 0x1p-7;
  const int64_t rows = 5, stride = vocab + 1 + shift;
  // By the byte, so that an access beyond a row is one beyond the memory.
  const auto logits = std::make_unique<T[]>(rows * stride + 16), gradients = std::make_unique<T[]>(rows * stride + 16);
  T* const x = logits.get() + shift;
  T* const g = over ? x : gradients.get() + (shift + (clip ? 1 : 0));
  for (int64_t i = 0; i < rows * stride; ++i) x[i] = narrow(static_cast<float>(3.0 * random_number()), T{});
  int64_t tokens[rows];
  bool mask[rows];
  float upstream[rows], old[rows], advantages[rows];
  for (int r = 0; r < rows; ++r) {
    tokens[r] = r == 0 ? 0 : r == 1 ? vocab - 1 : static_cast<int64_t>((random_number() + 1.0) / 2.0 * vocab) % vocab;
    mask[r] = r != 3;
    advantages[r] = r % 2 ? -1.0f : 1.0f;
    upstream[r] = r == 2 ? 0.0f : -0.37f * advantages[r];
  }
  std::vector<double> lse(rows), logprob(rows), entropy(rows), p(rows * vocab);
  const double temperature = 1.3;
  for (int r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(widen(x[r * stride + v]) / temperature);
    lse[r] = std::log(sum);
    for (int64_t v = 0; v < vocab; ++v) {
      const double log_p = widen(x[r * stride + v]) / temperature - lse[r];
      p[r * vocab + v] = std::exp(log_p);
      entropy[r] -= std::exp(log_p) * log_p;
    }
    logprob[r] = widen(x[r * stride + tokens[r]]) / temperature - lse[r];
    old[r] = static_cast<float>(logprob[r] + (r == 4 ? -0.05 : r == 1 ? -0.5 : 0.01));  // 4: held at 1.04
  }
  float out_logprob[rows], out_entropy[rows], factor = 0.5f, counts[] = {1.0f, 2.0f, 1.0f};
  double out_lse[rows];
  unsigned tickets = 0;
  OneRead args{};
  args.shape = {rows, rows, vocab};
  args.in = {{reinterpret_cast<char*>(x), 0, stride}, tokens, mask, nullptr, temperature, nullptr};
  args.out = {out_logprob, out_entropy, out_lse};
  args.upstream = {upstream, nullptr, nullptr};
  args.common = {&factor, counts, 3};
  args.clip = {clip ? old : nullptr, advantages, 0.04, 0.04, INFINITY, 20.0};
  args.gradient = {reinterpret_cast<char*>(g), 0, stride};
  args.tickets = &tickets;
  run<T>(resident, clusters, ranks, args);

  for (int r = 0; r < rows; ++r) {
    const std::string where = std::string(name) + (resident ? ", resident" : ", again") + ", " +
                              std::to_string(clusters) + " clusters of " + std::to_string(ranks) + ", V = " +
                              std::to_string(vocab) + ", shift " + std::to_string(shift) + (over ? ", in place" : "") +
                              (clip ? ", clipped" : "") + ", row " + std::to_string(r);
    double coefficient = mask[r] ? upstream[r] * 0.125 : 0.0;
    if (clip && coefficient != 0.0) {
      const double deviation = std::expm1(logprob[r] - old[r]);
      const bool held = advantages[r] > 0 ? deviation > 0.04 : deviation < -0.04;
      coefficient = held ? 0.0 : coefficient * (1.0 + deviation);
    }
    if (mask[r]) {
      expect(std::fabs(out_logprob[r] - logprob[r]) < 2e-6 * (1 + std::fabs(logprob[r])), "logprob", where);
      expect(std::fabs(out_entropy[r] - entropy[r]) < 4e-6 * (1 + entropy[r]), "entropy", where);
      expect(std::fabs(out_lse[r] - lse[r]) < 1e-6 * (1 + std::fabs(lse[r])), "lse", where);
    } else {
      expect(out_logprob[r] == 0.0f && out_entropy[r] == 0.0f && out_lse[r] == 0.0, "a masked row", where);
    }
    for (int64_t v = 0; v < vocab; ++v) {
      const double expected = coefficient * ((v == tokens[r]) - p[r * vocab + v]) / temperature;
      const double found = widen(g[r * stride + v]);
      const double least = sizeof(T) == 2 && name[0] == 'f' ? 6e-8 : 1e-37;
      if (std::fabs(found - expected) > (kStep + 4e-6) * std::fabs(expected) + least + 1e-15) {
        expect(false, "gradient", where + ", column " + std::to_string(v));
        break;
      }
    }
  }
}

template <class T>
void check_all(const char* name, bool few) {
  for (const int64_t vocab : {1, 7, 33, 601})
    for (const int shift : {0, 5})
      for (const bool over : {false, true})
        for (const bool clip : {false, true}) {
          if (few && (vocab < 33 || over != clip)) continue;
          check<T>(name, false, 2, 1, vocab, shift, over, clip);
          check<T>(name, true, 1, 4, vocab, shift, over, clip);
          check<T>(name, true, 2, 2, vocab, shift, over, clip);
        }
}

}  // namespace

int main(int count, char**) {  // any argument: few shapes, for a sanitizer that takes its time
  const bool few = count > 1;
  check_all<BFloat16>("bfloat16", few);
  if (!few) check_all<float>("float32", few);
  if (!few) check_all<Float16>("float16", few);
  std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}

