//! Numbers of a running server, written by the scheduler and the handlers and read by `/metrics` and `/status`.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that several threads see.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Replaces it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds to it.
    pub fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    /// Takes from it.
    pub fn sub(&self, value: u64) {
        self.0.fetch_sub(value, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of a histogram's classes, in seconds.
const BOUNDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Times by length.
#[derive(Debug, Default)]
pub struct Times {
    classes: [Number; BOUNDS.len()],
    count: Number,
    micros: Number,
}

impl Times {
    /// Counts a time.
    pub fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(i) = BOUNDS.iter().position(|&b| seconds <= b) {
            self.classes[i].add(1);
        }
        self.count.add(1);
        self.micros.add(time.as_micros() as u64);
    }

    fn write(&self, name: &str, help: &str, out: &mut String) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut sum = 0;
        for (bound, class) in BOUNDS.iter().zip(&self.classes) {
            sum += class.get();
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let (count, seconds) = (self.count.get().max(sum), self.micros.get() as f64 / 1e6);
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {seconds}\n{name}_count {count}");
    }
}

/// All of a server's numbers. Counters count from its start.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests whose answers are being generated.
    pub running: Number,
    /// Requests that wait.
    pub waiting: Number,
    /// Pages of keys and values.
    pub pages: Number,
    /// Pages that hold nothing.
    pub free_pages: Number,
    /// Pages in the prefix cache, those in use included.
    pub cached_pages: Number,
    /// Open connections.
    pub connections: Number,
    /// Tokens of prompts.
    pub prompt_tokens: Number,
    /// Tokens of prompts that were in the prefix cache.
    pub cached_tokens: Number,
    /// Tokens that the engine computed, those computed again included.
    pub computed: Number,
    /// Tokens generated.
    pub generated: Number,
    /// Tokens that were guessed.
    pub guessed: Number,
    /// Guesses that were right.
    pub right: Number,
    /// Steps of the engine.
    pub steps: Number,
    /// Sequences that gave up their pages and were computed again.
    pub preemptions: Number,
    /// Answers that were asked for.
    pub requests: Number,
    /// Answers that came to their end.
    pub completed: Number,
    /// Requests that were given up because nobody waited for them.
    pub cancelled: Number,
    /// Requests that ended because the engine failed.
    pub failures: Number,
    /// Requests refused because the queue was full.
    pub refused: Number,
    /// Steps that failed since the last that did not.
    pub failing: Number,
    /// 1 once the engine's thread has ended.
    pub dead: Number,
    /// From a request to its first token.
    pub first_token: Times,
    /// Between tokens of an answer.
    pub between_tokens: Times,
    /// From a request to the end of its answer.
    pub whole: Times,
}

impl Stats {
    /// Seconds that an answer takes on average; 0 before the first.
    pub fn request_seconds(&self) -> f64 {
        self.whole.micros.get() as f64 / 1e6 / self.whole.count.get().max(1) as f64
    }

    /// Prometheus' text form.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let rows: [(&str, &str, &Number, &str); 20] = [
            ("qp_requests_running", "gauge", &self.running, "Requests whose answers are being generated."),
            ("qp_requests_waiting", "gauge", &self.waiting, "Requests that wait."),
            ("qp_connections", "gauge", &self.connections, "Open connections."),
            ("qp_cache_pages", "gauge", &self.pages, "Pages of keys and values."),
            ("qp_cache_pages_free", "gauge", &self.free_pages, "Pages that hold nothing."),
            ("qp_cache_pages_shared", "gauge", &self.cached_pages, "Pages in the prefix cache."),
            ("qp_prompt_tokens_total", "counter", &self.prompt_tokens, "Tokens of prompts."),
            (
                "qp_prompt_tokens_cached_total",
                "counter",
                &self.cached_tokens,
                "Tokens of prompts found in the prefix cache.",
            ),
            ("qp_tokens_computed_total", "counter", &self.computed, "Tokens that the engine computed."),
            ("qp_tokens_generated_total", "counter", &self.generated, "Tokens generated."),
            ("qp_tokens_guessed_total", "counter", &self.guessed, "Tokens guessed."),
            ("qp_tokens_guessed_right_total", "counter", &self.right, "Guesses that were right."),
            ("qp_steps_total", "counter", &self.steps, "Steps of the engine."),
            (
                "qp_preemptions_total",
                "counter",
                &self.preemptions,
                "Sequences that were computed again because pages ran out.",
            ),
            ("qp_requests_total", "counter", &self.requests, "Answers asked for."),
            ("qp_requests_completed_total", "counter", &self.completed, "Answers that came to their end."),
            (
                "qp_requests_cancelled_total",
                "counter",
                &self.cancelled,
                "Requests given up because nobody waited for more of them: gone, or ended by a text.",
            ),
            ("qp_requests_failed_total", "counter", &self.failures, "Requests that ended because the engine failed."),
            ("qp_requests_refused_total", "counter", &self.refused, "Requests refused because the queue was full."),
            ("qp_engine_dead", "gauge", &self.dead, "1 once the engine's thread has ended."),
        ];
        for (name, kind, number, help) in rows {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {}", number.get());
        }
        self.first_token.write("qp_first_token_seconds", "From a request to its first token.", &mut out);
        self.between_tokens.write("qp_between_tokens_seconds", "Between tokens of an answer.", &mut out);
        self.whole.write("qp_answer_seconds", "From a request to the end of its answer.", &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_text() {
        let stats = Stats::default();
        stats.generated.add(7);
        for ms in [0, 3, 3, 100_000] {
            stats.first_token.add(Duration::from_millis(ms));
        }
        let text = stats.prometheus();
        assert!(text.contains("\nqp_tokens_generated_total 7\n"), "{text}");
        assert!(text.contains("qp_first_token_seconds_bucket{le=\"0.0025\"} 1\n"), "{text}");
        assert!(text.contains("qp_first_token_seconds_bucket{le=\"0.005\"} 3\n"), "{text}");
        assert!(
            text.contains("qp_first_token_seconds_bucket{le=\"+Inf\"} 4\nqp_first_token_seconds_sum 100.006\n"),
            "{text}"
        );
    }
}
