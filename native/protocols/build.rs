//! Generates the messages (and with the feature `server` the service traits) from the `.proto`
//! files that the Python package is generated from too. Pure Rust: no `protoc` is needed.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

const PROTO_FILES: [&str; 5] = ["agent", "agent_types", "csi", "health", "oci"];

fn main() -> Result<(), Box<dyn Error>> {
    let include = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    let files: Vec<PathBuf> = PROTO_FILES
        .iter()
        .map(|name| include.join(format!("kata_hybrid/protos/{name}.proto")))
        .collect();
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    protobuf_codegen::Codegen::new()
        .pure()
        .include(&include)
        .inputs(&files)
        .out_dir(&out)
        .run()?;
    generate_services(&include, &files, &out)
}

#[cfg(feature = "server")]
fn generate_services(include: &Path, files: &[PathBuf], out: &Path) -> Result<(), Box<dyn Error>> {
    let services = out.join("services");
    std::fs::create_dir_all(&services)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&services)
        .include(include)
        .inputs(files)
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // A request that is not served is UNIMPLEMENTED. The generator says NOT_FOUND, which runtimes
    // read as "the process is gone".
    for name in ["agent_ttrpc.rs", "health_ttrpc.rs"] {
        let path = services.join(name);
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(
            &path,
            text.replace("Code::NOT_FOUND", "Code::UNIMPLEMENTED"),
        )?;
    }
    // The generated files start with inner attributes, so they have to be modules of their own.
    std::fs::write(
        out.join("services.rs"),
        "#[path = \"services/agent_ttrpc.rs\"]\npub mod agent_ttrpc;\n\
         #[path = \"services/health_ttrpc.rs\"]\npub mod health_ttrpc;\n",
    )?;
    Ok(())
}

#[cfg(not(feature = "server"))]
fn generate_services(_: &Path, _: &[PathBuf], _: &Path) -> Result<(), Box<dyn Error>> {
    Ok(())
}
