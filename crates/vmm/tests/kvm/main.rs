//! Real guests on real KVM: on this machine where its processor can, otherwise in the box. The same binary is the test, what
//! runs in the box, and what runs in the guest.

mod api;
mod guest;
mod handler;
mod host;
mod hotplug;
mod network;
mod proxy;
mod services;
mod session;
mod settings;
mod snapshot;
mod vhost_user;

use std::process::ExitCode;

use libtest_mimic::{Failed, Trial};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(guest::ARGUMENT) {
        guest::main();
    }
    let trial = |name: &str, test: fn() -> Result<(), Failed>| Trial::test(name, test);
    let trials = vec![
        trial("a_guest_uses_its_devices_and_powers_itself_off", host::devices),
        trial(
            "a_guest_starts_by_the_linux_protocol_reads_its_console_and_resets_itself",
            host::linux_protocol,
        ),
        trial("a_guest_without_a_root_panics_and_the_machine_ends", host::panic),
        trial("what_is_not_a_kernel_is_refused_with_a_reason", host::bad_kernels),
        trial("a_forbidden_system_call_ends_the_monitor", host::forbidden_call),
        trial("a_machine_is_put_together_started_paused_and_changed_through_the_api", api::life),
        trial("processors_console_and_confinement_are_as_they_were_set", settings::settings),
        trial("a_monitor_logs_counts_limits_and_types_for_its_user", services::services),
        trial("a_disk_of_another_process_grows_and_its_end_is_noticed", vhost_user::vhost_user),
        trial("memory_is_plugged_used_saved_and_given_back", hotplug::hotplug),
        trial("a_guest_is_on_the_network_until_its_tap_goes_away", network::network),
        trial(
            "a_machine_goes_on_in_others_from_whole_and_from_partial_snapshots_and_knows_that_it_does",
            snapshot::snapshot,
        ),
    ];
    kapsel_kvmbox::test_main(trials, host::prepare)
}
