//! Rebuilds the BPF object that is committed beside its source, and checks that the two belong together.
//!
//! A user of Replayer needs neither of the tools that this needs, which is why the object is committed. The build has
//! to come out the same on every machine: what a path or a compiler could bring in is kept out or written down.
//! Nothing here loads a program into a kernel.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use object::build::elf::{Builder, SectionData};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, SymbolKind,
};

use crate::privilege::{as_root, on_path};

const TARGET: &str = "bpfel-unknown-none";
/// The linker is pinned: another one may choose other instructions.
const LINKER_VERSION: &str = "0.13.0";
/// The instruction set that kernels have from 5.1 on. What the programs call asks for newer ones anyway (docs/ebpf.md).
const BPF_CPU: &str = "v3";
/// The compiler of the Debian package `rustc-web`, which brings a core library for BPF.
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";
const DISTRIBUTION_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// Rebuild the committed BPF object, or check it.
#[derive(clap::Args, Debug)]
pub(crate) struct EbpfArgs {
    /// Change nothing; fail when the committed object is not what its source compiles to.
    #[arg(long)]
    pub(crate) check: bool,
}

/// Builds the BPF programs. With `check` the result is compared with the committed object, otherwise it replaces it.
///
/// # Errors
/// A tool that is missing and can't be installed; a build that fails; with `check`, any difference.
pub(crate) fn run(check: bool) -> Result<()> {
    let root = workspace_root();
    let committed = root.join("replayer-ebpf/replayer.bpf.o");
    let toolchain_note = root.join("replayer-ebpf/replayer.bpf.toolchain");

    let compiler = Compiler::find_or_install()?;
    let linker_dir = find_or_install_linker(&root, &compiler)?;
    let object = without_debug_sections(&build(&root, &compiler, &linker_dir)?)?;
    refuse_machine_paths(&object, &root)?;
    let toolchain =
        format!("{}, LLVM {}, bpf-linker {LINKER_VERSION}\n", compiler.version, compiler.llvm_version);

    if !check {
        fs::write(&committed, &object).with_context(|| format!("writing {}", committed.display()))?;
        fs::write(&toolchain_note, &toolchain)?;
        println!("{}: {} bytes, by {}", committed.display(), object.len(), toolchain.trim_end());
        return Ok(());
    }
    let expected = fs::read(&committed)
        .with_context(|| format!("reading {}; `cargo xtask ebpf` makes it", committed.display()))?;
    let differences = differences(&pieces(&expected)?, &pieces(&object)?);
    if differences.is_empty() {
        println!("the committed BPF object is what its source compiles to");
        return Ok(());
    }
    let built_by = fs::read_to_string(&toolchain_note).unwrap_or_default();
    let cause = if built_by == toolchain {
        "the source has changed since: run `cargo xtask ebpf` and commit the result".to_owned()
    } else {
        format!(
            "it was built by {}, this machine has {}: use the same toolchain to tell whether the source differs",
            built_by.trim_end(),
            toolchain.trim_end()
        )
    };
    bail!(
        "the committed BPF object is not what its source compiles to:\n  {}\n{cause}",
        differences.join("\n  ")
    )
}

fn workspace_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// A compiler that can make BPF code.
struct Compiler {
    rustc: PathBuf,
    /// Whether the core library has to be compiled too, for want of a compiled one.
    build_core: bool,
    /// "rustc 1.96.0".
    version: String,
    /// "22.1.2".
    llvm_version: String,
}

impl Compiler {
    /// What is there is taken, the distribution's first: the committed object is made by it. Else it is installed.
    fn find_or_install() -> Result<Compiler> {
        if let Some(found) = Compiler::find()? {
            return Ok(found);
        }
        if on_path("apt-get") {
            let install =
                [&["install", "--yes", "--no-install-recommends"], &DISTRIBUTION_PACKAGES[..]].concat();
            // A package that is not to be had is no error yet: there is another way.
            apt_get(&["update"]).and_then(|()| apt_get(&install)).unwrap_or_else(report);
        }
        if let Some(found) = Compiler::find()? {
            return Ok(found);
        }
        if on_path("rustup") {
            announce_and_run(Command::new("rustup").args(["component", "add", "rust-src"]))
                .unwrap_or_else(report);
        }
        Compiler::find()?.ok_or_else(|| {
            anyhow!(
                "no compiler for {TARGET}: install the Debian packages {}, or run `rustup component add rust-src`",
                DISTRIBUTION_PACKAGES.join(" and ")
            )
        })
    }

    fn find() -> Result<Option<Compiler>> {
        let distribution = Path::new(DISTRIBUTION_RUSTC);
        if distribution.exists() && has_files(&print(distribution, &["target-libdir", "--target", TARGET])?) {
            return Compiler::new(distribution.to_owned(), false).map(Some);
        }
        let rustc = PathBuf::from("rustc");
        if has_files(&print(&rustc, &["sysroot"])?.join("lib/rustlib/src/rust/library/core")) {
            return Compiler::new(rustc, true).map(Some);
        }
        Ok(None)
    }

    fn new(rustc: PathBuf, build_core: bool) -> Result<Compiler> {
        let about = output(Command::new(&rustc).arg("-vV"))?;
        let field = |name: &str| {
            let line = about.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::to_owned).with_context(|| format!("`{} -vV` has no line {name:?}", rustc.display()))
        };
        let version = format!("rustc {}", field("release: ")?);
        let llvm_version = field("LLVM version: ")?;
        Ok(Compiler { rustc, build_core, version, llvm_version })
    }

    fn llvm_major(&self) -> &str {
        self.llvm_version.split('.').next().unwrap_or(&self.llvm_version)
    }
}

/// The directory of a bpf-linker that understands the compiler's LLVM; built on the first call.
fn find_or_install_linker(root: &Path, compiler: &Compiler) -> Result<PathBuf> {
    let major = compiler.llvm_major();
    let home = root.join("target/ebpf-toolchain").join(format!("llvm-{major}"));
    let linker = home.join("bin/bpf-linker");
    let expected = format!("bpf-linker {LINKER_VERSION}");
    if output(Command::new(&linker).arg("--version")).is_ok_and(|version| version.trim() == expected) {
        return Ok(home.join("bin"));
    }

    fs::create_dir_all(&home)?;
    let mut install = Command::new("cargo");
    install
        .args(["install", "bpf-linker", "--locked", "--force", "--version", LINKER_VERSION, "--root"])
        .arg(&home);
    clean_environment(&mut install);
    // The LLVM that the workspace's own toolchain carries, when it is the right one: then no LLVM package is needed.
    let toolchain_lib = print(Path::new("rustc"), &["sysroot"])?.join("lib");
    if let Some(library) = find_llvm_library(&toolchain_lib, major) {
        let link = home.join(format!("libLLVM-{major}.so"));
        let _absent = fs::remove_file(&link);
        std::os::unix::fs::symlink(library, &link)?;
        install.args(["--no-default-features", "--features", &format!("llvm-{major},no-llvm-linking")]);
        install.env(
            "RUSTFLAGS",
            format!(
                "-L native={} -C link-arg=-lLLVM-{major} -C link-arg=-Wl,-rpath,{}",
                home.display(),
                toolchain_lib.display()
            ),
        );
    } else {
        if !on_path(&format!("llvm-config-{major}")) && on_path("apt-get") {
            apt_get(&["install", "--yes", &format!("llvm-{major}-dev")]).unwrap_or_else(report);
        }
        install.args(["--no-default-features", "--features", &format!("llvm-{major}")]);
    }
    announce_and_run(&mut install).with_context(|| {
        format!("bpf-linker {LINKER_VERSION} needs LLVM {major}: `apt-get install llvm-{major}-dev`")
    })?;
    Ok(home.join("bin"))
}

/// `libLLVM.so.22.1-rust-1.95.0-stable` and the like.
fn find_llvm_library(dir: &Path, major: &str) -> Option<PathBuf> {
    let prefix = format!("libLLVM.so.{major}.");
    let mut entries = fs::read_dir(dir).ok()?.flatten();
    entries.find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path())
}

/// Compiles and links; returns the object's bytes.
fn build(root: &Path, compiler: &Compiler, linker_dir: &Path) -> Result<Vec<u8>> {
    let target_dir = root.join("target/ebpf");
    let mut path = linker_dir.as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());

    let mut flags = format!("-C target-cpu={BPF_CPU} -C debuginfo=2 -C link-arg=--btf");
    for (from, to) in machine_paths(root, compiler)? {
        flags.push_str(&format!(" --remap-path-prefix={from}={to}"));
    }
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"]).arg(&target_dir);
    if compiler.build_core {
        cargo.args(["-Z", "build-std=core"]);
    }
    clean_environment(&mut cargo);
    // BPF is no stable target: RUSTC_BOOTSTRAP lets a stable compiler make code for it.
    cargo.env("PATH", path).env("RUSTC", &compiler.rustc).env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags);
    announce_and_run(cargo.current_dir(root.join("replayer-ebpf")))?;
    let built = target_dir.join(TARGET).join("release/replayer");
    fs::read(&built).with_context(|| format!("reading {}", built.display()))
}

/// Prefixes of source paths on this machine, and what they become: the line information is to be the same everywhere.
/// Of two prefixes that fit, rustc takes the later one.
fn machine_paths(root: &Path, compiler: &Compiler) -> Result<Vec<(String, String)>> {
    let sysroot = print(&compiler.rustc, &["sysroot"])?;
    let mut paths = vec![(format!("{}/lib/rustlib/src/rust", sysroot.display()), "rust".to_owned())];
    // The directory of a registry has a hash in its name.
    for registry in fs::read_dir(cargo_home()?.join("registry/src")).into_iter().flatten().flatten() {
        paths.push((registry.path().display().to_string(), "registry".to_owned()));
    }
    paths.push((root.display().to_string(), "replayer".to_owned()));
    if let Some((path, _)) = paths.iter().find(|(path, _)| path.contains(char::is_whitespace)) {
        bail!("{path:?} has a space in it, which RUSTFLAGS can't express: build from another directory");
    }
    Ok(paths)
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// Debug sections are most of the file, and no loader reads them. BTF stays: it names types, functions and lines.
fn without_debug_sections(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("reading the linked object")?;
    for section in &mut builder.sections {
        section.delete = section.name.starts_with(b".debug") || section.name.starts_with(b".rel.debug");
    }
    // LLVM keeps the names of sections and symbols in one table; the writer wants one for each.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut out = Vec::new();
    builder.write(&mut out).context("writing the stripped object")?;
    Ok(out)
}

fn refuse_machine_paths(object: &[u8], root: &Path) -> Result<()> {
    for path in [root.to_owned(), cargo_home()?, env::temp_dir()] {
        let text = path.display().to_string();
        let found = object.windows(text.len()).any(|window| window == text.as_bytes());
        ensure!(!found, "the object would contain the path {text}: a prefix is missing in machine_paths()");
    }
    Ok(())
}

/// A program, a map or another named thing in an object: what has to be equal.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    bytes: Vec<u8>,
    /// Offset, kind and name of each symbol that it refers to.
    relocations: Vec<(u64, u32, String)>,
}

/// All pieces by "section/name". Debug sections and BTF have none.
fn pieces(object: &[u8]) -> Result<BTreeMap<String, Piece>> {
    let file = object::File::parse(object).context("not an ELF object")?;
    let mut pieces = BTreeMap::new();
    for symbol in file.symbols() {
        let (Some(section), SymbolKind::Text | SymbolKind::Data) = (symbol.section_index(), symbol.kind())
        else {
            continue;
        };
        let section = file.section_by_index(section)?;
        let (start, end) = (symbol.address(), symbol.address() + symbol.size());
        let bytes =
            section.data_range(start, symbol.size())?.context("a symbol reaches out of its section")?;
        let mut relocations = Vec::new();
        for (offset, relocation) in section.relocations().filter(|(offset, _)| (start..end).contains(offset))
        {
            let RelocationTarget::Symbol(target) = relocation.target() else {
                bail!("a relocation in {} refers to no symbol", section.name()?);
            };
            let RelocationFlags::Elf { r_type } = relocation.flags() else { bail!("not an ELF relocation") };
            relocations.push((offset - start, r_type, file.symbol_by_index(target)?.name()?.to_owned()));
        }
        let name = format!("{}/{}", section.name()?, symbol.name()?);
        pieces.insert(name, Piece { bytes: bytes.to_vec(), relocations });
    }
    ensure!(!pieces.is_empty(), "the object defines nothing");
    Ok(pieces)
}

/// One line for each piece that is not in both and equal.
fn differences(committed: &BTreeMap<String, Piece>, built: &BTreeMap<String, Piece>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, old) in committed {
        match built.get(name) {
            None => lines.push(format!("{name}: the source has it no more")),
            Some(new) if old.bytes != new.bytes => {
                let same = old.bytes.iter().zip(&new.bytes).take_while(|(a, b)| a == b).count();
                let (was, is) = (old.bytes.len(), new.bytes.len());
                lines
                    .push(format!("{name}: differs from byte {same} on (committed {was} bytes, built {is})"));
            }
            Some(new) if old.relocations != new.relocations => {
                lines.push(format!("{name}: refers to other maps or functions"));
            }
            Some(_) => {}
        }
    }
    lines.extend(
        built.keys().filter(|name| !committed.contains_key(*name)).map(|name| format!("{name}: is new")),
    );
    lines
}

/// Keeps away from another build what the cargo that runs this program set for it, and profiles that the environment changes.
fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PROFILE_") {
            command.env_remove(name);
        }
    }
    for name in
        ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET", "RUSTC_WRAPPER"]
    {
        command.env_remove(name);
    }
}

/// `rustc --print` of a path.
fn print(rustc: &Path, what: &[&str]) -> Result<PathBuf> {
    Ok(output(Command::new(rustc).arg("--print").args(what))?.trim().into())
}

fn has_files(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    // Through env(1): sudo does not hand the variable on.
    let mut command = as_root("env", "installing packages")?;
    announce_and_run(command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(arguments))
}

fn announce_and_run(command: &mut Command) -> Result<()> {
    let mut line = vec![command.get_program().to_string_lossy()];
    line.extend(command.get_args().map(|arg| arg.to_string_lossy()));
    let line = line.join(" ");
    eprintln!("xtask: {line}");
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("starting `{line}`"))?;
    ensure!(status.success(), "`{line}` failed: {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("starting {:?}", command.get_program()))?;
    ensure!(out.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn report(error: anyhow::Error) {
    eprintln!("xtask: {error:#}");
}
