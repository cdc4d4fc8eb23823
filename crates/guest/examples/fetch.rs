//! Fetches Debian's kernel (or takes the given one) into a directory, and prints where it and an initramfs with the given agent are.

use kapsel_guest::{Initramfs, Kernel, KernelSource};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(agent)) = (arguments.next(), arguments.next()) else {
        return Err("usage: fetch DIR AGENT [VMLINUZ]".into());
    };
    let source = arguments.next().map_or(KernelSource::Debian, |path| KernelSource::Path(path.into()));
    let kernel = Kernel::ensure(dir.as_ref(), &source, &mut |progress| eprintln!("{progress:?}"))?;
    let initramfs = Initramfs::build(dir.as_ref(), agent.as_ref(), &kernel)?;
    println!("{} {} {}", kernel.release, kernel.vmlinux.display(), initramfs.display());
    Ok(())
}
