//! Streams between host and guest.
