//! Compiles the CUDA kernels under `cuda/` to PTX and writes the structs of their parameters in Rust, if the feature `cuda`
//! is on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Sources and the virtual architecture each is compiled for.
const KERNELS: [(&str, &str); 32] = [
    ("rows", "compute_80"),
    ("loss", "compute_80"),
    ("fused", "compute_80"),
    ("backward", "compute_80"),
    ("filter", "compute_80"),
    ("averages", "compute_80"),
    ("smoothing", "compute_80"),
    ("class_logits", "compute_80"),
    ("sort", "compute_80"),
    ("divergence", "compute_80"),
    ("forward_sm80", "compute_80"),
    ("forward_outputs_sm80", "compute_80"),
    ("gradient_sm80", "compute_80"),
    ("products_sm80", "compute_80"),
    ("adapter", "compute_80"),
    ("rms_norm", "compute_80"),
    ("gated", "compute_80"),
    ("rope", "compute_80"),
    ("attention_bf16", "compute_80"),
    ("attention_f16", "compute_80"),
    ("attention_f32", "compute_80"),
    ("optimizer", "compute_80"),
    ("forward_sm90a", "compute_90a"),
    ("forward_outputs_sm90a", "compute_90a"),
    ("gradient_sm90a", "compute_90a"),
    ("gradient_outputs_sm90a", "compute_90a"),
    ("logits_sm90a", "compute_90a"),
    ("products_sm90a", "compute_90a"),
    ("products_mixed_sm90a", "compute_90a"),
    ("products_ragged_sm90a", "compute_90a"),
    ("attention_sm90a_bf16", "compute_90a"),
    ("attention_sm90a_f16", "compute_90a"),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(message) = compile().and_then(|()| write_params()) {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let nvcc = nvcc();
    let version = run(Command::new(&nvcc).arg("--version")).map_err(|e| {
        format!(
            "candle-cut-cross-entropy: the feature `cuda` needs NVIDIA's compiler, nvcc 12.1 or later.\n\
             Tried {}: {e}\nInstall the CUDA toolkit, or set NVCC or CUDA_HOME.",
            nvcc.display()
        )
    })?;
    // Such as "Cuda compilation tools, release 13.0, V13.0.88".
    let release = version.split("release ").nth(1).and_then(|release| {
        let mut numbers = release
            .split([',', '.'])
            .map(|n| n.trim().parse::<u32>().ok());
        Some((numbers.next()??, numbers.next()??))
    });
    if release.is_some_and(|release| release < (12, 1)) {
        return Err(format!(
            "candle-cut-cross-entropy: nvcc 12.1 or later is needed, {} is\n{version}",
            nvcc.display()
        ));
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let children: Vec<_> = KERNELS
        .map(|(name, arch)| {
            let source = Path::new("cuda").join(name).with_extension("cu");
            let ptx = out.join(name).with_extension("ptx");
            let mut command = Command::new(&nvcc);
            command
                .args(["--ptx", "-O3", "-std=c++17", "-arch", arch, "-o"])
                .arg(&ptx)
                .arg(&source);
            // One thread a file: each takes seconds.
            (source, std::thread::spawn(move || run(&mut command)))
        })
        .into_iter()
        .collect();
    for (source, child) in children {
        child
            .join()
            .map_err(|_| "the compiler's thread panicked".to_string())?
            .map_err(|e| {
                format!(
                    "candle-cut-cross-entropy: compiling {}: {e}",
                    source.display()
                )
            })?;
    }
    Ok(())
}

/// Writes `params.rs`: a module for every file of `cuda/` that has a `struct SomeParams`, with those structs.
fn write_params() -> Result<(), String> {
    let io = |e: std::io::Error| format!("candle-cut-cross-entropy: parameters of kernels: {e}");
    let mut files = Vec::new();
    for entry in fs::read_dir("cuda").map_err(io)? {
        files.push(entry.map_err(io)?.path());
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let module = file.file_stem().unwrap_or_default().to_string_lossy();
        let source = fs::read_to_string(&file).map_err(io)?;
        sources.push((module.into_owned(), without_comments(&source), file));
    }
    let of_module = |name: &str| {
        let defines = |source: &str| source.contains(&format!("struct {name} {{"));
        let mut sources = sources.iter();
        sources
            .find(|(_, source, _)| defines(source))
            .map(|(module, ..)| module.clone())
    };
    let mut rust = String::new();
    for (module, source, file) in &sources {
        let structs = params(source, of_module)
            .map_err(|e| format!("candle-cut-cross-entropy: {}: {e}", file.display()))?;
        if !structs.is_empty() {
            rust += &format!("pub(in crate::cuda) mod {module} {{\n{structs}}}\n");
        }
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    fs::write(out.join("params.rs"), rust).map_err(io)
}

fn without_comments(source: &str) -> String {
    let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    source.lines().map(code).collect::<Vec<_>>().join("\n")
}

/// The structs whose names end in `Params`, in Rust: the same fields in the same order. A pointer is an address, a struct
/// lies in the module that `of_module` says.
fn params(code: &str, of_module: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut rust = String::new();
    for part in code.split("struct ").skip(1) {
        let Some((name, rest)) = part.split_once('{') else {
            continue;
        };
        let name = name.trim();
        if !name.ends_with("Params") {
            continue;
        }
        let fields = rest.split_once("};").ok_or("a struct without an end")?.0;
        rust += &format!(
            "    #[repr(C)]\n    #[derive(Debug, Clone, Copy, Default)]\n    pub(in crate::cuda) struct {name} {{\n"
        );
        for field in fields.split(';').map(str::trim).filter(|f| !f.is_empty()) {
            let field = field.strip_prefix("const ").unwrap_or(field);
            let (kind, names) = field
                .split_once(|c: char| c.is_whitespace())
                .ok_or_else(|| format!("{name}: no name in {field:?}"))?;
            let pointer_type = kind.strip_suffix('*');
            for field in names.split(',').map(str::trim) {
                let pointer = field.strip_prefix('*');
                if pointer_type.is_some() && names.contains(',') {
                    return Err(format!(
                        "{name}: of `{kind} {names}` only the first is a pointer"
                    ));
                }
                let kind = match (pointer_type.or(pointer), kind) {
                    (Some(_), _) => "u64".to_owned(),
                    (None, "uint32_t") => "u32".to_owned(),
                    (None, "int32_t") => "i32".to_owned(),
                    (None, "uint64_t") => "u64".to_owned(),
                    (None, "int64_t") => "i64".to_owned(),
                    (None, "float") => "f32".to_owned(),
                    (None, kind) if kind.ends_with("Params") => {
                        let module = of_module(kind).ok_or_else(|| format!("{name}: no {kind}"))?;
                        format!("super::{module}::{kind}")
                    }
                    _ => return Err(format!("{name}: {field} has a type unknown here, {kind}")),
                };
                let field = pointer.unwrap_or(field);
                rust += &format!("        pub {field}: {kind},\n");
            }
        }
        rust += &format!(
            "    }}\n    // SAFETY: plain numbers, laid out as the kernel's struct.\n    unsafe impl super::DeviceRepr for {name} {{}}\n"
        );
    }
    Ok(rust)
}

/// The compiler by the variables that name it, then by where it usually lies, then by the PATH.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    for home in homes.chain(["/usr/local/cuda".into()]) {
        let nvcc = Path::new(&home).join("bin/nvcc");
        if fs::exists(&nvcc).unwrap_or(false) {
            return nvcc;
        }
    }
    "nvcc".into()
}

/// What the program prints, or why it failed and what it printed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|e| format!("cannot run {command:?}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!(
            "{command:?} failed ({})\n{}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        ))
    }
}
