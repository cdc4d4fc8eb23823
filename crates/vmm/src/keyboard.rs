//! The keyboard controller (i8042) and a keyboard behind it, on which only Ctrl, Alt and Del are ever pressed.
//!
//! Linux asks the controller and the keyboard what they can do; a question without an answer costs it up to a second, so
//! every one is answered.

use std::collections::VecDeque;

use kapsel_devices::state::{Reader, StateError, Writer};
use vmm_sys_util::eventfd::EventFd;

/// Bits of the status register.
mod status {
    /// A byte can be read.
    pub const OUTPUT: u8 = 1;
    /// The controller passed its test.
    pub const SYSTEM: u8 = 1 << 2;
    /// The keyboard is not locked.
    pub const UNLOCKED: u8 = 1 << 4;
}

/// Commands to the controller.
mod command {
    pub const READ_CONTROL: u8 = 0x20;
    pub const WRITE_CONTROL: u8 = 0x60;
    pub const DISABLE_MOUSE: u8 = 0xa7;
    pub const ENABLE_MOUSE: u8 = 0xa8;
    pub const TEST_MOUSE: u8 = 0xa9;
    pub const TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const WRITE_OUTPUT: u8 = 0xd1;
    pub const ECHO_KEYBOARD: u8 = 0xd2;
    pub const ECHO_MOUSE: u8 = 0xd3;
    pub const WRITE_MOUSE: u8 = 0xd4;
}

/// Commands to the keyboard, and its answers.
mod key {
    pub const ACKNOWLEDGE: u8 = 0xfa;
    pub const IDENTIFY: u8 = 0xf2;
    pub const RESET: u8 = 0xff;
    /// An ordinary keyboard.
    pub const IDENTITY: [u8; 2] = [0xab, 0x83];
    /// Its test went well.
    pub const PASSED: u8 = 0xaa;
}

/// In the control register: the keyboard interrupts.
const INTERRUPT: u8 = 1;
/// In the control register: the controller passed its test.
const PASSED: u8 = 1 << 2;
/// Scan codes of set 2: pressed in this order, then released.
const CTRL_ALT_DEL: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// A guest that does not read has no more bytes waiting than this.
const BYTES_MAX: usize = 32;

/// Controller and keyboard.
pub struct Keyboard {
    line: EventFd,
    control: u8,
    /// The command whose data comes next.
    pending: Option<u8>,
    bytes: VecDeque<u8>,
}

impl Keyboard {
    /// A keyboard with this interrupt.
    pub fn new(line: EventFd) -> Self {
        Keyboard { line, control: INTERRUPT | PASSED, pending: None, bytes: VecDeque::new() }
    }

    /// Goes on where another one was saved.
    ///
    /// # Errors
    /// When that is not a keyboard's state.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader::new(state);
        self.control = reader.u8()?;
        self.pending = Some(reader.u8()?).filter(|command| *command != 0);
        self.bytes = reader.bytes()?.iter().copied().collect();
        if self.bytes.len() > BYTES_MAX {
            return Err(StateError::Invalid("the keyboard has too many bytes"));
        }
        reader.finish()
    }

    /// Where it stands.
    pub fn save(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u8(self.control);
        // No command is zero.
        writer.u8(self.pending.unwrap_or(0));
        writer.bytes(&self.bytes.iter().copied().collect::<Vec<u8>>());
        writer.finish()
    }

    /// Presses and releases the keys. False when the guest has not read what was there before.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        let room = self.bytes.len() + CTRL_ALT_DEL.len() <= BYTES_MAX;
        if room {
            self.say(&CTRL_ALT_DEL);
        }
        room
    }

    /// Port 0x64 is read.
    pub fn status(&self) -> u8 {
        let output = if self.bytes.is_empty() { 0 } else { status::OUTPUT };
        status::SYSTEM | status::UNLOCKED | output
    }

    /// Port 0x60 is read. The next byte interrupts again.
    pub fn data(&mut self) -> u8 {
        let byte = self.bytes.pop_front().unwrap_or(0);
        if !self.bytes.is_empty() {
            self.interrupt();
        }
        byte
    }

    /// Port 0x64 is written to.
    pub fn command(&mut self, command: u8) {
        self.pending = None;
        match command {
            command::READ_CONTROL => self.say(&[self.control]),
            command::TEST => self.say(&[0x55]),
            command::WRITE_CONTROL
            | command::WRITE_OUTPUT
            | command::ECHO_KEYBOARD
            | command::ECHO_MOUSE
            | command::WRITE_MOUSE => self.pending = Some(command),
            command::DISABLE_MOUSE
            | command::ENABLE_MOUSE
            | command::DISABLE_KEYBOARD
            | command::ENABLE_KEYBOARD => {}
            command::TEST_KEYBOARD => self.say(&[0]),
            // Its clock line is stuck: there is no mouse.
            command::TEST_MOUSE => self.say(&[1]),
            // Whatever else is asked for is not there.
            _ => self.say(&[0xff]),
        }
    }

    /// Port 0x60 is written to: a command's data, or something to the keyboard.
    pub fn write_data(&mut self, byte: u8) {
        match self.pending.take() {
            Some(command::WRITE_CONTROL) => self.control = byte,
            // It comes from the keyboard, by which the driver sees that there is no mouse.
            Some(command::ECHO_KEYBOARD | command::ECHO_MOUSE) => self.say(&[byte]),
            // A mouse that is not there does not take it.
            Some(command::WRITE_MOUSE) => self.say(&[0xfe]),
            Some(_) => {}
            None => match byte {
                key::IDENTIFY => {
                    let [first, second] = key::IDENTITY;
                    self.say(&[key::ACKNOWLEDGE, first, second]);
                }
                key::RESET => self.say(&[key::ACKNOWLEDGE, key::PASSED]),
                _ => self.say(&[key::ACKNOWLEDGE]),
            },
        }
    }

    fn say(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() > BYTES_MAX {
            self.bytes.clear();
        }
        self.bytes.extend(bytes);
        self.interrupt();
    }

    fn interrupt(&self) {
        if self.control & INTERRUPT != 0
            && let Err(error) = self.line.write(1)
        {
            tracing::debug!(%error, "the keyboard's interrupt is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn keyboard() -> Keyboard {
        Keyboard::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    fn drain(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| (keyboard.status() & status::OUTPUT != 0).then(|| keyboard.data())).collect()
    }

    #[test]
    fn drivers_questions_are_answered() {
        let mut keyboard = keyboard();
        keyboard.command(command::TEST);
        keyboard.command(command::READ_CONTROL);
        assert_eq!(drain(&mut keyboard), [0x55, INTERRUPT | PASSED]);
        keyboard.command(command::WRITE_CONTROL);
        keyboard.write_data(0x45);
        keyboard.command(command::READ_CONTROL);
        keyboard.write_data(key::IDENTIFY);
        assert_eq!(drain(&mut keyboard), [0x45, 0xfa, 0xab, 0x83]);
        keyboard.command(command::ECHO_MOUSE);
        keyboard.write_data(0x5a);
        assert_eq!(drain(&mut keyboard), [0x5a]);
        assert_eq!(keyboard.data(), 0);
    }

    #[test]
    fn keys_are_pressed_once_each_byte_interrupts_and_a_deaf_guest_is_not_filled() {
        let mut keyboard = keyboard();
        assert!(keyboard.press_ctrl_alt_del());
        for expected in CTRL_ALT_DEL {
            assert_eq!(keyboard.line.read().unwrap(), 1);
            assert_eq!(keyboard.data(), expected);
        }
        assert!(keyboard.line.read().is_err());
        assert!(keyboard.press_ctrl_alt_del() && keyboard.press_ctrl_alt_del());
        assert!(!keyboard.press_ctrl_alt_del());
        for _ in 0..1000 {
            keyboard.write_data(0xf4);
        }
        assert!(drain(&mut keyboard).len() <= BYTES_MAX);
    }
}
