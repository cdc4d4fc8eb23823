//! Saved state: numbers in little-endian order and bytes with their count. What is read may be anything.

use crate::queue::QueueError;

/// Why saved state cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It ends too early.
    #[error("the saved state ends too early")]
    Truncated,
    /// It does not end where it should.
    #[error("the saved state is longer than it should be")]
    TooLong,
    /// It is not a state that can be.
    #[error("the saved state is impossible: {0}")]
    Invalid(&'static str),
    /// A queue in it is not.
    #[error("the saved state has an impossible queue: {0}")]
    Queue(#[from] QueueError),
}

/// Puts state together.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// Everything so far.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Adds bytes without their count.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Adds bytes with their count.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.raw(bytes);
    }

    /// Adds a number.
    pub fn u8(&mut self, value: u8) {
        self.raw(&[value]);
    }

    /// Adds a number.
    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    /// Adds a number.
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// Adds a number.
    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }
}

/// Takes state apart.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// From the beginning.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader(bytes)
    }

    /// The next bytes.
    ///
    /// # Errors
    /// [`StateError::Truncated`], as for every other value.
    pub fn raw(&mut self, count: usize) -> Result<&'a [u8], StateError> {
        let (front, back) = self.0.split_at_checked(count).ok_or(StateError::Truncated)?;
        self.0 = back;
        Ok(front)
    }

    /// Bytes with their count.
    ///
    /// # Errors
    /// [`StateError::Truncated`].
    pub fn bytes(&mut self) -> Result<&'a [u8], StateError> {
        let count = self.u32()?;
        self.raw(count as usize)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let bytes = self.raw(N)?;
        Ok(std::array::from_fn(|n| bytes[n]))
    }

    /// A number.
    ///
    /// # Errors
    /// [`StateError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, StateError> {
        self.array().map(u8::from_le_bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// [`StateError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, StateError> {
        self.array().map(u16::from_le_bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// [`StateError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, StateError> {
        self.array().map(u32::from_le_bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// [`StateError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, StateError> {
        self.array().map(u64::from_le_bytes)
    }

    /// The end has to be here.
    ///
    /// # Errors
    /// [`StateError::TooLong`].
    pub fn finish(self) -> Result<(), StateError> {
        if self.0.is_empty() { Ok(()) } else { Err(StateError::TooLong) }
    }
}
