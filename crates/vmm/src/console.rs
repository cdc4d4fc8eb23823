//! The serial port (a 16550): the guest's output goes to the monitor's, and what is typed goes to the guest.

use std::io;

use kapsel_devices::state::{Reader, StateError, Writer};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::serial::Output;

/// The port's interrupt.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Signalled when the guest has read all of its input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::debug!(%error, "the guest's console may take no more input");
        }
    }
}

/// The serial port.
pub struct Console(Serial<Line, Drained, Output>);

impl Console {
    /// A port with the interrupt `line`, which signals `drained` when there is room for all of its input again.
    pub fn new(line: EventFd, drained: EventFd, output: Output) -> Self {
        Console(Serial::with_events(Line(line), Drained(drained), output))
    }

    /// A port that goes on where another one was saved.
    ///
    /// # Errors
    /// When that is not a port's state.
    pub fn restored(
        line: EventFd,
        drained: EventFd,
        output: Output,
        state: &[u8],
    ) -> Result<Self, StateError> {
        let mut reader = Reader::new(state);
        let state = SerialState {
            baud_divisor_low: reader.u8()?,
            baud_divisor_high: reader.u8()?,
            interrupt_enable: reader.u8()?,
            interrupt_identification: reader.u8()?,
            line_control: reader.u8()?,
            line_status: reader.u8()?,
            modem_control: reader.u8()?,
            modem_status: reader.u8()?,
            scratch: reader.u8()?,
            in_buffer: reader.bytes()?.to_vec(),
        };
        reader.finish()?;
        let serial = Serial::from_state(&state, Line(line), Drained(drained), output);
        serial.map(Console).map_err(|_| StateError::Invalid("the serial port"))
    }

    /// Raises the interrupt that its driver may be waiting for. That which was raised before the interrupt controllers got
    /// their state is lost, and so is one that was still on its way to them when they were saved.
    pub fn go_on(&self) {
        const NONE: u8 = 1;
        if self.0.state().interrupt_identification & NONE == 0
            && let Err(error) = self.0.interrupt_evt().trigger()
        {
            tracing::warn!(%error, "the guest's console may stand still");
        }
    }

    /// Where the port stands.
    pub fn save(&self) -> Vec<u8> {
        let (state, mut writer) = (self.0.state(), Writer::default());
        for register in [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ] {
            writer.u8(register);
        }
        writer.bytes(&state.in_buffer);
        writer.finish()
    }

    /// The guest reads a register.
    pub fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    /// The guest writes a register. What cannot be written out is lost; the guest goes on.
    pub fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.0.write(register, value) {
            tracing::debug!(?error, "a character of the guest's console is lost");
        }
    }

    /// How many bytes of output were lost because they were too many.
    pub fn dropped(&self) -> u64 {
        self.0.writer().dropped()
    }

    /// How many bytes of input there is room for.
    pub fn room(&self) -> usize {
        self.0.fifo_capacity()
    }

    /// Gives the guest input; no more than there is room for.
    pub fn input(&mut self, bytes: &[u8]) {
        if let Err(error) = self.0.enqueue_raw_bytes(bytes) {
            tracing::debug!(?error, "input for the guest's console is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn a_driver_that_waits_for_its_interrupt_gets_it_when_it_goes_on() {
        const INTERRUPT_ENABLE: u8 = 1;
        const WHEN_EMPTY: u8 = 2;
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        for (enabled, waits) in [(0, false), (WHEN_EMPTY, true)] {
            let mut console = Console::new(event(), event(), Output::nowhere());
            console.write(INTERRUPT_ENABLE, enabled);
            let line = event();
            let restored =
                Console::restored(line.try_clone().unwrap(), event(), Output::nowhere(), &console.save());
            // What is raised so early is lost.
            let _ = line.read();
            restored.unwrap().go_on();
            assert_eq!(line.read().is_ok(), waits);
        }
    }
}
