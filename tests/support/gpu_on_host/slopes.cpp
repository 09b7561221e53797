// csrc/token_slope.h against each objective's derivative in long double, written from its paper: a program that checks
// itself. Ratios, probabilities and divergences on both sides of every bound, and what is not finite.
#include "../../../csrc/token_slope.h"

#include <cstdio>
#include <initializer_list>

using namespace gspo;

namespace {

using Real = long double;
constexpr double kInf = INFINITY, kSaturated = 20.0;

int failures = 0;

void expect(bool right, const char* what, double found, double expected, const Token& t) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "%s is wrong: %.17g, not %.17g: logprob %.17g, old %.17g, rollout %.17g, advantage %g\n", what,
               found, expected, t.logprob, t.old_logprob, t.rollout_logprob, t.advantage);
}

bool near(double found, double expected, double relative, double absolute = 0.0) {
  if (std::isnan(expected)) return std::isnan(found);
  return found == expected || std::fabs(found - expected) <= relative * std::fabs(expected) + absolute;
}

Real finite(Real x) { return x > 1e30 ? Real{1e30} : x < -1e30 ? Real{-1e30} : x; }
Real log_ratio_of(const Token& t) { return finite(t.logprob) - finite(t.old_logprob); }
Real ratio_of(const Token& t) { return expl(log_ratio_of(t) > kSaturated ? kSaturated : log_ratio_of(t)); }
Real clipped(Real x, Real low, Real high) { return x < low ? low : x > high ? high : x; }
Real tv(const Token& t) { return expl(t.logprob) - expl(t.rollout_logprob); }

Real log_of_others(Real logprob) { return logprob < -0.7L ? log1pl(-expl(logprob)) : logl(-expm1l(logprob)); }

Real kl(const Token& t) {
  const Real log_pi = finite(t.logprob), log_mu = finite(t.rollout_logprob);
  const Real mu = expl(log_mu), others = -expm1l(log_mu);
  if (log_pi == log_mu) return 0.0L;
  const Real of_token = mu > 0 ? mu * (log_mu - log_pi) : 0.0L;
  const Real of_others = others > 0 ? others * (log_of_others(log_mu) - log_of_others(log_pi)) : 0.0L;
  return log_pi > log_mu ? of_token + of_others : -(of_token + of_others);
}

struct Objective {
  const char* name;
  TokenSlope loss;
  Real (*slope)(const Token&);  // of a token of numbers
};

TokenSlope form(Range positive, Range negative, bool hold, Measure measure = Measure::kRatio, double max_weight = kInf,
                double penalty = 0.0) {
  return {nullptr, nullptr, nullptr, positive, negative, hold, measure, max_weight, penalty, kSaturated};
}

const Objective kObjectives[] = {
    {"GRPO", form({-kInf, 0.27}, {-0.2, kInf}, false),
     [](const Token& t) {
       const Real w = ratio_of(t);
       const bool held = log_ratio_of(t) > kSaturated || (t.advantage > 0 ? w > 1.27L : w < 0.8L);
       return held ? 0.0L : -w * t.advantage;
     }},
    {"PPO with a dual clip", form({-kInf, 0.2}, {-0.2, 2.0}, false),
     [](const Token& t) {
       const Real w = ratio_of(t);
       return (t.advantage > 0 ? w > 1.2L : w < 0.8L || w > 3.0L) ? 0.0L : -w * t.advantage;
     }},
    {"CISPO", form({-0.3, 0.4}, {-0.3, 0.4}, true),
     [](const Token& t) { return -clipped(ratio_of(t), 0.7L, 1.4L) * t.advantage; }},
    {"CISPO, no lower bound", form({-1.0, 4.0}, {-1.0, 4.0}, true),
     [](const Token& t) { return -clipped(ratio_of(t), 0.0L, 5.0L) * t.advantage; }},
    {"CISPO, no bound", form({-kInf, kInf}, {-kInf, kInf}, true),
     [](const Token& t) { return -ratio_of(t) * t.advantage; }},
    {"TOPR", form({0.0, 0.0}, {-1.0, 0.0}, true),
     [](const Token& t) { return t.advantage > 0 ? -t.advantage : -clipped(ratio_of(t), 0.0L, 1.0L) * t.advantage; }},
    {"DRO", form({0.0, 0.0}, {0.0, 0.0}, true, Measure::kRatio, kInf, 0.05),
     [](const Token& t) {
       const Real r = log_ratio_of(t);
       return -t.advantage + (std::fabs(r) > kSaturated ? 0.0L : 0.05L * r);
     }},
    {"DPPO, TV", form({-kInf, 0.2}, {-0.15, kInf}, false, Measure::kTv),
     [](const Token& t) {
       const bool outside = t.advantage > 0 ? tv(t) > 0.2L : tv(t) < -0.15L;
       return outside || log_ratio_of(t) > kSaturated ? 0.0L : -ratio_of(t) * t.advantage;
     }},
    {"DPPO, TV, truncated", form({-kInf, 0.2}, {-0.15, kInf}, false, Measure::kTv, 5.0),
     [](const Token& t) {
       const bool outside = t.advantage > 0 ? tv(t) > 0.2L : tv(t) < -0.15L;
       return outside ? 0.0L : -clipped(ratio_of(t), 0.0L, 5.0L) * t.advantage;
     }},
    {"DPPO, KL, truncated", form({-kInf, 0.05}, {-0.04, kInf}, false, Measure::kKl, 5.0),
     [](const Token& t) {
       const bool outside = t.advantage > 0 ? kl(t) > 0.05L : kl(t) < -0.04L;
       return outside ? 0.0L : -clipped(ratio_of(t), 0.0L, 5.0L) * t.advantage;
     }},
};

void check_objectives() {
  const double probabilities[] = {-kInf, -1e4, -90.0, -21.0, -7.0, -2.0, -0.7, -0.69, -0.2, -1e-3, -1e-9, -1e-30, 0.0};
  const double log_ratios[] = {0.0,     1e-7,    -1e-7, 0.1823, 0.1824, 0.239,  0.2391, -0.2231, -0.2232,
                               0.3364,  0.3365,  0.5,   -0.5,   1.0986, 1.0987, 1.6,    1.7,     -0.3566,
                               -0.3567, 19.99,   20.01, 90.0,   -90.0,  kInf,   -kInf};
  for (const Objective& objective : kObjectives)
    for (const double logprob : probabilities)
      for (const double log_ratio : log_ratios)
        for (const double rollout : probabilities)
          for (const double advantage : {-2.0, -0.0, 0.0, 0.7}) {
            const double old = std::isinf(log_ratio) ? -log_ratio : (std::isinf(logprob) ? -5.0 : logprob) - log_ratio;
            const Token token{logprob, old, rollout, advantage};
            const double found = slope_of(token, objective.loss), expected = objective.slope(token);
            expect(near(found, expected, 1e-12, 1e-15), objective.name, found, expected, token);
          }
}

// The bounds themselves are inside, the next number is not. Both ends of a range, for advantages of both signs.
void check_bounds() {
  const Token tokens[] = {{-0.5, -0.8, -1.1, 1.0}, {-1.9, -1.2, -0.3, 1.0}, {-1e-9, -1e-8, -1e-6, 1.0}};
  for (Token token : tokens)
    for (const Measure measure : {Measure::kRatio, Measure::kTv, Measure::kKl})
      for (const bool positive : {true, false})
        for (const bool hold : {false, true}) {
          if (hold && measure != Measure::kRatio) continue;
          const double log_ratio = token.logprob - token.old_logprob, ratio = 1.0 + std::expm1(log_ratio);
          const double at = measure == Measure::kRatio ? std::expm1(log_ratio)
                                                       : moved_by(measure, token.logprob, token.rollout_logprob);
          token.advantage = positive ? 1.0 : -1.0;
          for (const bool upper : {false, true})
            for (const double toward : {at, kInf, -kInf}) {
              const double bound = std::nextafter(at, toward);
              const Range range = upper ? Range{-kInf, bound} : Range{bound, kInf}, all{-kInf, kInf};
              const TokenSlope loss = form(positive ? range : all, positive ? all : range, hold, measure);
              const bool inside = upper ? at <= bound : at >= bound;
              const double weight = inside ? ratio : hold ? 1.0 + bound : 0.0, expected = -weight * token.advantage;
              const double found = slope_of(token, loss);
              expect(found == expected, "a bound", found, expected, token);
            }
        }
}

// At max_log_ratio a ratio has its gradient; above it only what is held or truncated has one, of a constant weight.
void check_saturation() {
  const double highest = 1.0 + std::expm1(kSaturated), above = std::nextafter(-kSaturated, -kInf);
  const Range all{-kInf, kInf};
  const struct {
    const char* name;
    TokenSlope loss;
    double at, beyond;  // weights
  } cases[] = {{"saturation", form(all, all, false), highest, 0.0},
               {"saturation, by TV", form(all, all, false, Measure::kTv), highest, 0.0},
               {"saturation, truncated", form(all, all, false, Measure::kRatio, 5.0), 5.0, 5.0},
               {"saturation, truncated late", form(all, all, false, Measure::kKl, 1e30), highest, highest},
               {"saturation, held", form({-kInf, 9.0}, all, true), 10.0, 10.0},
               {"saturation, held by nothing", form(all, all, true), highest, highest},
               {"saturation, held and truncated", form({-kInf, 9.0}, all, true, Measure::kRatio, 5.0), 5.0, 5.0}};
  for (const auto& c : cases) {
    const Token at{0.0, -kSaturated, -kSaturated, 2.0}, beyond{0.0, above, -kSaturated, 2.0};
    expect(slope_of(at, c.loss) == -2.0 * c.at, c.name, slope_of(at, c.loss), -2.0 * c.at, at);
    expect(slope_of(beyond, c.loss) == -2.0 * c.beyond, c.name, slope_of(beyond, c.loss), -2.0 * c.beyond, beyond);
  }
}

void check_divergences() {
  const double logprobs[] = {-1e30, -1e4, -90.0, -7.0,  -2.0,   -0.7, -0.3,
                             -1e-3, -1e-6, -1e-9, -1e-20, -1e-300, -0.0, 0.0};
  for (const double logprob : logprobs)
    for (const double rollout : logprobs) {
      const Token token{logprob, 0.0, rollout, 0.0};
      const double divergence = moved_by(Measure::kKl, logprob, rollout), of_kl = static_cast<double>(kl(token));
      expect(near(divergence, of_kl, 1e-12), "a divergence", divergence, of_kl, token);
      const double difference = moved_by(Measure::kTv, logprob, rollout), of_tv = static_cast<double>(tv(token));
      expect(near(difference, of_tv, 1e-12, 1e-18), "a difference", difference, of_tv, token);
    }
  for (const double rollout : {-9.0, -0.7, -0.01, -1e-5}) {  // too small for long double: step^2 mu / (2 (1 - mu))
    const double logprob = rollout * (1.0 + 1e-9), step = logprob - rollout;
    const double found = moved_by(Measure::kKl, logprob, rollout);
    const double expected = step * step * std::exp(rollout) / (2.0 * std::expm1(rollout));
    expect(near(found, expected, 1e-5), "a small divergence", found, expected, {logprob, 0.0, rollout, 0.0});
  }
}

void check_not_finite() {
  for (const Objective& objective : kObjectives)
    for (const double advantage : {-1.0, 0.0, 1.0}) {
      const bool reads_rollout = objective.loss.measure != Measure::kRatio;
      for (const double logprob : {-1e-3, -3.0}) {
        const Token tokens[] = {{NAN, -1.0, -1.0, advantage},
                                {logprob, NAN, -1.0, advantage},
                                {logprob, -1.0, -1.0, NAN},
                                {logprob, -30.0, -1.0, NAN},
                                {logprob, -1.0, reads_rollout ? NAN : -1.0, reads_rollout ? advantage : NAN}};
        for (const Token& token : tokens) {
          const double found = slope_of(token, objective.loss);
          expect(std::isnan(found), objective.name, found, NAN, token);
        }
        for (const double rollout : {1e-7, kInf}) {  // more than 0
          const Token token{logprob, -1.0, rollout, advantage};
          const double found = slope_of(token, objective.loss);
          expect(std::isfinite(found), objective.name, found, 0.0, token);
        }
      }
      for (const double old : {-kInf, 0.0, kInf})
        for (const double rollout : {-kInf, 0.0, kInf}) {
          const Token token{-kInf, old, rollout, advantage};
          const double found = slope_of(token, objective.loss);
          expect(std::isfinite(found), objective.name, found, 0.0, token);
        }
    }
}

}  // namespace

int main() {
  check_objectives();
  check_bounds();
  check_saturation();
  check_divergences();
  check_not_finite();
  std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
