//! Rate limits: token buckets for bytes and for operations.
//!
//! A bucket holds up to its size in tokens and fills up in its refill time; a burst comes on top, once. A request takes a
//! token for itself and one for each of its bytes. One that is larger than the bucket waits until the bucket is full and
//! leaves it in debt, so the rate holds whatever the requests' sizes are.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::timer::Timer;

/// A bucket's measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// How many tokens it holds.
    pub size: u64,
    /// Tokens beside those, which do not come again.
    pub burst: u64,
    /// How long an empty bucket takes to fill up.
    pub refill: Duration,
}

/// Limits of a device or of one of its directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes.
    pub bandwidth: Option<Limit>,
    /// Requests.
    pub operations: Option<Limit>,
}

#[derive(Debug)]
struct Bucket {
    limit: Limit,
    burst: u64,
    /// Less than zero after a request that was larger than the bucket.
    tokens: i128,
    counted: Instant,
}

impl Bucket {
    /// A full bucket; none when it could never give anything or never be empty.
    fn new(limit: Limit, now: Instant) -> Option<Self> {
        let limits = limit.size > 0 && !limit.refill.is_zero();
        let tokens = i128::from(limit.size);
        limits.then_some(Bucket { limit, burst: limit.burst, tokens, counted: now })
    }

    /// Puts the tokens in that have come since the last time. Time for a part of a token is not lost.
    fn refill(&mut self, now: Instant) {
        let (size, refill) = (u128::from(self.limit.size), self.limit.refill.as_nanos());
        let elapsed = now.saturating_duration_since(self.counted).as_nanos();
        let new = elapsed.saturating_mul(size) / refill;
        if new == 0 {
            return;
        }
        self.tokens = self.tokens.saturating_add_unsigned(new);
        if self.tokens >= i128::from(self.limit.size) {
            self.tokens = i128::from(self.limit.size);
            self.counted = now;
        } else {
            self.counted += nanoseconds(new * refill / size);
        }
    }

    /// How long until it can give so many.
    fn wait(&self, count: u64) -> Duration {
        let needed = i128::from(count.min(self.limit.size)) - self.tokens - i128::from(self.burst);
        let needed = needed.max(0).unsigned_abs();
        nanoseconds(needed.saturating_mul(self.limit.refill.as_nanos()).div_ceil(u128::from(self.limit.size)))
    }

    fn take(&mut self, count: u64) {
        let burst = self.burst.min(count);
        self.burst -= burst;
        self.tokens -= i128::from(count - burst);
    }
}

fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

/// A bucket for what is lost when it has to wait.
#[derive(Debug)]
pub struct Meter(Bucket);

impl Meter {
    /// A full bucket; none when it could never give anything or never be empty.
    pub fn new(limit: Limit) -> Option<Self> {
        Bucket::new(limit, Instant::now()).map(Meter)
    }

    /// Takes so many tokens, if they are there.
    pub fn takes(&mut self, count: u64) -> bool {
        self.0.refill(Instant::now());
        let there = self.0.wait(count).is_zero();
        if there {
            self.0.take(count);
        }
        there
    }
}

/// Lets requests pass at a limited rate.
#[derive(Debug)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
    timer: Timer,
    waiting: bool,
    throttled: u64,
}

impl Limiter {
    /// A limiter with full buckets.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let timer = Timer::new()?;
        let mut limiter = Limiter { bandwidth: None, operations: None, timer, waiting: false, throttled: 0 };
        limiter.set(limits);
        Ok(limiter)
    }

    /// Sets limits anew, with full buckets; one that is absent stays as it is.
    pub fn set(&mut self, limits: Limits) {
        let now = Instant::now();
        if let Some(limit) = limits.bandwidth {
            self.bandwidth = Bucket::new(limit, now);
        }
        if let Some(limit) = limits.operations {
            self.operations = Bucket::new(limit, now);
        }
        if self.waiting {
            self.timer.once(Duration::ZERO);
        }
    }

    /// Whether a request of so many bytes may pass now. If not, [`Limiter::timer`] says when to try again.
    pub fn admits(&mut self, bytes: u64) -> bool {
        if self.is_unlimited() {
            return true;
        }
        if self.waiting {
            return false;
        }
        let now = Instant::now();
        let mut wait = Duration::ZERO;
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(count));
            }
        }
        if !wait.is_zero() {
            self.waiting = true;
            self.throttled += 1;
            self.timer.once(wait);
            return false;
        }
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(count);
            }
        }
        true
    }

    /// Whether every request passes.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }

    /// Becomes readable when a request that had to wait may be tried again; then [`Limiter::wake`] has to be called.
    pub fn timer(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.timer)
    }

    /// Nobody has to wait any more, until it turns out that he has.
    pub fn wake(&mut self) {
        self.timer.clear();
        self.waiting = false;
    }

    /// Nobody waits any more and nobody is to be woken: the device was reset.
    pub fn rest(&mut self) {
        self.timer.stop();
        self.waiting = false;
    }

    /// How often something had to wait.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, burst: u64, refill_ms: u64) -> (Bucket, Instant) {
        let start = Instant::now();
        let limit = Limit { size, burst, refill: Duration::from_millis(refill_ms) };
        (Bucket::new(limit, start).unwrap(), start)
    }

    /// Takes requests of `count` for a second of pretended time, a millisecond at a time, and says how many passed.
    fn passed(bucket: &mut Bucket, start: Instant, count: u64) -> u64 {
        (0..=1000)
            .map(|ms| {
                bucket.refill(start + Duration::from_millis(ms));
                let mut passed = 0;
                while bucket.wait(count).is_zero() {
                    bucket.take(count);
                    passed += 1;
                }
                passed
            })
            .sum()
    }

    #[test]
    fn the_rate_holds_for_small_and_for_huge_requests() {
        for count in [1, 7, 1000, 2500] {
            let (mut bucket, start) = bucket(1000, 0, 100);
            let tokens = passed(&mut bucket, start, count) * count;
            // A full bucket and ten times its size in a second; the last request may be in debt.
            assert!((11_000 - count..=11_000 + count).contains(&tokens), "{count}: {tokens}");
        }
    }

    #[test]
    fn a_burst_comes_once() {
        let (mut bucket, start) = bucket(1000, 5000, 100);
        assert_eq!(passed(&mut bucket, start, 1), 16_000);
        assert_eq!(bucket.burst, 0);
    }

    #[test]
    fn a_slow_bucket_loses_no_parts_of_tokens_and_extremes_do_not_overflow() {
        let (mut slow, start) = bucket(3, 0, 1000);
        assert_eq!(passed(&mut slow, start, 1), 6);
        let (mut extreme, start) = bucket(u64::MAX, u64::MAX, u64::MAX);
        extreme.take(u64::MAX);
        extreme.take(u64::MAX);
        extreme.take(u64::MAX);
        extreme.refill(start + Duration::from_secs(1 << 40));
        assert!(!extreme.wait(u64::MAX).is_zero());
        let never = Limit { size: 0, burst: 1, refill: Duration::from_secs(1) };
        assert!(Bucket::new(never, start).is_none());
    }

    #[test]
    fn who_has_to_wait_is_woken() {
        let limit = Limit { size: 10, burst: 0, refill: Duration::from_millis(20) };
        let mut limiter = Limiter::new(Limits { bandwidth: Some(limit), operations: None }).unwrap();
        assert!(limiter.admits(10));
        assert!(!limiter.admits(10) && !limiter.admits(10));
        let timer = rustix::event::PollFd::new(&limiter.timer, rustix::event::PollFlags::IN);
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut [timer], Some(&second)), Ok(1));
        limiter.wake();
        assert!(limiter.admits(10));
        assert_eq!(limiter.throttled(), 1);
        limiter.set(Limits { bandwidth: Some(Limit { size: 0, ..limit }), operations: None });
        assert!((0..1000).all(|_| limiter.admits(1 << 30)));
    }
}
