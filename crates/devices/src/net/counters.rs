//! What a network device counts.

use crate::Metric;

macro_rules! counters {
    ($($name:ident: $doc:literal),* $(,)?) => {
        /// Counters by Firecracker's names; "rx" is towards the guest.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $doc] pub $name: u64,)*
        }

        impl Counters {
            /// Names and values.
            pub fn named(&self) -> Vec<Metric> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

counters! {
    rx_packets_count: "Frames for the guest.",
    rx_bytes_count: "Their bytes.",
    rx_fails: "Frames that no buffer of the guest can hold.",
    no_rx_avail_buffer: "How often the guest had no room.",
    rx_tap_event_count: "How often the tap had something new.",
    tap_read_fails: "How often the tap failed.",
    tx_packets_count: "The guest's frames.",
    tx_bytes_count: "Their bytes.",
    tx_malformed_frames: "Requests of the guest that are no frames.",
    tap_write_fails: "Frames that the tap did not take.",
}
