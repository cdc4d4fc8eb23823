//! One boot of the box, and what its promises are.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use kapsel_kvmbox::KvmBox;

#[test]
fn the_box_runs_a_dynamic_program_beside_kvm_and_reports_its_end() {
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), "test -c /dev/kvm && /opt/cat /etc/who && echo \"$GREETING\" && exit 42\n")
        .unwrap();
    let who = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(who.path(), "in the box\n").unwrap();
    std::fs::set_permissions(who.path(), std::fs::Permissions::from_mode(0o400)).unwrap();

    let mut live = Vec::new();
    let outcome = KvmBox::new()
        .memory_mib(512)
        .timeout(Duration::from_secs(120))
        .file(script.path(), "/run/script")
        .file(who.path(), "/etc/who")
        .program("/bin/cat", "/opt/cat")
        .unwrap()
        .env("GREETING", "it's \"quoted\"")
        .run_with(&["sh", "/run/script"], &mut live)
        .unwrap();

    let text = String::from_utf8_lossy(&outcome.output);
    assert_eq!((text.as_ref(), outcome.status), ("in the box\nit's \"quoted\"\n", 42));
    assert_eq!(live, outcome.output);
    assert!(outcome.overhead < Duration::from_secs(60), "{:?}", outcome.overhead);
}
