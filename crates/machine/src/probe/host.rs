//! The guest's loop, run by the host itself.

use std::arch::asm;
use std::time::Instant;

/// Turns of the loop: a fraction of a millisecond on a processor, some milliseconds on an emulated one.
const ROUNDS: u32 = 1_000_000;

/// Instructions that this host executes in a second. Of a few tries the fastest, since another program may have the processor.
pub(super) fn speed() -> f64 {
    let run = || {
        let begun = Instant::now();
        // SAFETY: the loop counts a register down, which it is given, and touches nothing else.
        unsafe {
            asm!("2:", "dec {0:e}", "jnz 2b", inout(reg) ROUNDS => _, options(nomem, nostack));
        }
        2.0 * f64::from(ROUNDS) / begun.elapsed().as_secs_f64()
    };
    (0..3).map(|_| run()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_processor_does_some_million_instructions_a_second() {
        let speed = super::speed();
        assert!((1e6..1e12).contains(&speed), "{speed}");
    }
}
