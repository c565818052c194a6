//! The filter of kernels without tcx: it stays when its role is killed, and goes when the next one begins.
//!
//! Needs root. Everything happens in a network namespace without a name, gone with the test.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use replayer::netns::Namespace;
use replayer::programs::{Program, Programs};

const DEVICE: &str = "in";

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().expect(program);
    assert!(output.status.success(), "{program} {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// Ids of the programs of `ring`'s filters.
fn filters() -> Vec<u32> {
    let text = run("tc", &format!("filter show dev {DEVICE} ingress"));
    let of_ring = text.lines().filter(|line| line.contains(" ring "));
    let id = |line: &str| line.split_once(" id ")?.1.split(' ').next()?.parse().ok();
    of_ring.map(|line| id(line).unwrap_or_else(|| panic!("no id: {line}"))).collect()
}

fn attach() -> Programs {
    let mut programs = Programs::load().expect("load");
    programs.attach_clsact(Program::Ring, DEVICE).expect("attach");
    programs
}

/// The role of the process that is killed: this program once more, told by a variable of its environment.
const ROLE: &str = "REPLAYER_TEST_ATTACHED_UNTIL_KILLED";

fn be_attached_until_killed() -> ! {
    let _programs = attach();
    println!("attached");
    loop {
        std::thread::park();
    }
}

fn start_another() -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.env(ROLE, "1").arg("--nocapture").stdout(Stdio::piped());
    let mut child = command.spawn().expect("start");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    if !lines.map_while(Result::ok).any(|line| line.ends_with("attached")) {
        let _ = child.kill();
        panic!("it did not attach: {:?}", child.wait());
    }
    child
}

#[test]
fn b049_a_filter_that_a_killed_role_has_left_is_removed_by_the_next_and_one_in_use_is_not() {
    if std::env::var_os(ROLE).is_some() {
        be_attached_until_killed();
    }
    assert!(nix::unistd::geteuid().is_root(), "needs root: run `cargo xtask test`");
    let namespace = Namespace::anonymous().expect("a namespace");
    let body = || {
        run("ip", &format!("link add {DEVICE} type veth peer name out"));
        let mut another = start_another();
        let theirs = filters();
        assert_eq!(theirs.len(), 1, "{theirs:?}");
        let ours = attach();
        assert_eq!(filters().len(), 2, "the other one is in use");
        drop(ours);
        assert_eq!(filters(), theirs);
        another.kill().expect("kill");
        another.wait().expect("its end");
        assert_eq!(filters(), theirs, "the kernel removes nothing");
        let ours = attach();
        let left = filters();
        assert!(left.len() == 1 && left != theirs, "{left:?}, and it was {theirs:?}");
        drop(ours);
        assert!(filters().is_empty());
    };
    namespace.run(body).expect("enter the namespace");
}
