//! Generates the messages and the ttrpc service of `agent.proto`, in pure Rust: no `protoc` is needed.

use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/agent.proto");
    let out = env::var("OUT_DIR")?;
    Codegen::new()
        .inputs(["src/agent.proto"])
        .include("src")
        .out_dir(&out)
        .rust_protobuf()
        // No descriptors at run time: nothing uses reflection, and every kilobyte of the agent is in every sandbox.
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false).lite_runtime(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // `include!` takes no inner attributes; the including module carries them instead.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(&path, text)?;
    }
    Ok(())
}
