//! What is put in the box, and how kapsel is called in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kapsel_guest::{Kernel, KernelSource};
use kapsel_kvmbox::{BUSYBOX, KvmBox};
use kapsel_testkit::TarBuilder;

/// Where the programs are in the box.
const PROGRAMS: &str = "/opt/kapsel";
/// kapsel's data in the box.
const ROOT: &str = "/kapsel";
/// The box's configuration.
const CONFIG: &str = "/opt/config.toml";
/// The image's archive in the box.
pub const IMAGE: &str = "/opt/busybox.tar";
/// The longest that everything may take.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Linked to the libraries of this host.
const DYNAMIC: [&str; 3] = ["kapsel", "containerd-shim-kapsel-v2", "kapsel-fsd"];
/// Linked statically.
const STATIC: [&str; 2] = ["guest/kapsel-agent", "static/kapsel-vmm"];

/// What the box's kernel needs to connect a namespace and to redirect its frames.
const MODULES: [&str; 4] =
    ["drivers/net/veth", "net/sched/sch_ingress", "net/sched/cls_u32", "net/sched/act_mirred"];
/// iproute2's, in the box: busybox's cannot make pairs.
const IP: &str = "/opt/ip";

/// Puts programs, kernel and image in the box.
pub fn prepare(kvm_box: KvmBox) -> kapsel_kvmbox::Result<KvmBox> {
    let built = Path::new(env!("CARGO_BIN_EXE_kapsel")).parent().unwrap();
    let mut kvm_box = kvm_box.memory_mib(3072).timeout(PATIENCE);
    for name in DYNAMIC {
        kvm_box = kvm_box.program(built.join(name), Path::new(PROGRAMS).join(name))?;
    }
    for name in STATIC {
        let program = built.join(name);
        assert!(program.exists(), "{} is not there; `make build` makes it", program.display());
        kvm_box = kvm_box.file(program, Path::new(PROGRAMS).join(name));
    }
    kvm_box = MODULES.into_iter().fold(kvm_box.program("/bin/ip", IP)?, KvmBox::module);
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let kernel = Kernel::ensure(&temporary.join("data"), &KernelSource::Debian, &mut |_| {})?;
    for file in files(kernel.vmlinux.parent().unwrap()) {
        let inside = Path::new(ROOT).join(file.strip_prefix(temporary.join("data")).unwrap());
        kvm_box = kvm_box.file(file, inside);
    }
    let image = temporary.join("busybox.tar");
    fs::write(&image, rootfs()).unwrap();
    let config = temporary.join("config.toml");
    // Not `auto`: how fast guests are measured to be in an emulated host depends on what else runs on this one.
    fs::write(&config, "isolation = \"kapsel-vmm\"\nstart_timeout = 300\n").unwrap();
    Ok(kvm_box.file(config, CONFIG).file(image, IMAGE))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn rootfs() -> Vec<u8> {
    let mut tar = TarBuilder::new();
    for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        tar = tar.dir(dir);
    }
    tar = tar.executable("bin/busybox", fs::read(BUSYBOX).unwrap());
    for tool in ["sh", "cat", "echo", "hostname", "ip", "md5sum", "nc", "sleep", "true", "uname"] {
        tar = tar.symlink(format!("bin/{tool}"), "busybox");
    }
    tar.build()
}

/// kapsel with arguments, without input.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(Path::new(PROGRAMS).join("kapsel"));
    command.args(arguments).env("KAPSEL_ROOT", ROOT).env("KAPSEL_CONFIG", CONFIG).stdin(Stdio::null());
    command
}

/// How a call of kapsel ended.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Ran {
    fn of(output: &Output, took: Duration) -> Ran {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        Ran { code: output.status.code(), stdout, stderr, took }
    }
}

/// Runs kapsel to its end, with this on its standard input.
pub fn run_with(arguments: &[&str], input: &[u8]) -> Ran {
    let begun = Instant::now();
    let mut command = command(arguments);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kapsel starts");
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        // One that does not read it all has ended, and says why.
        scope.spawn(move || drop(std::io::Write::write_all(&mut stdin, input)));
        child.wait_with_output().expect("kapsel ends")
    });
    let ran = Ran::of(&output, begun.elapsed());
    println!("{:6.2} s  kapsel {}", ran.took.as_secs_f64(), arguments.join(" "));
    ran
}

/// Runs kapsel to its end.
pub fn run(arguments: &[&str]) -> Ran {
    run_with(arguments, b"")
}

/// Runs kapsel, which has to succeed, and gives what it printed.
#[track_caller]
pub fn ok(arguments: &[&str]) -> String {
    let ran = run(arguments);
    assert_eq!(ran.code, Some(0), "kapsel {arguments:?}: {}\n{}", ran.stderr, logs());
    ran.stdout
}

/// Runs `ip` with arguments and gives what it printed.
#[track_caller]
pub fn ip(arguments: &str) -> String {
    let program = if kapsel_kvmbox::inside() { IP } else { "ip" };
    let ran = Command::new(program).args(arguments.split(' ')).output().expect("ip starts");
    assert!(ran.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// What kapsel's other processes wrote.
pub fn logs() -> String {
    let all = files(&Path::new(ROOT).join("run"));
    let mut text = String::new();
    for path in all.iter().filter(|path| path.extension().is_some_and(|extension| extension == "log")) {
        text += &format!("{}:\n{}\n", path.display(), fs::read_to_string(path).unwrap_or_default());
    }
    text
}
