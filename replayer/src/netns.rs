//! Network namespaces: one that only this process can see, and a way to run code in it.
//!
//! A namespace without a name lives as long as a process, a thread or a file descriptor refers to it. The
//! only reference here is a descriptor, so that the kernel takes the namespace down, and every device in it,
//! when this process ends, however it ends.
//!
//! What may not happen here: the namespace of a calling thread is never changed. Whatever has to happen
//! elsewhere happens in a thread that is made for it and ends with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, kept alive by a descriptor.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// A new, empty namespace that nothing else refers to. Its loopback device is down.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn anonymous() -> io::Result<Namespace> {
        // Of the thread that unshares only: the namespace of a process's other threads stays.
        in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Namespace::current()
        })?
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel's, where /proc is not there for example.
    pub fn current() -> io::Result<Namespace> {
        Ok(Namespace(File::open("/proc/thread-self/ns/net")?.into()))
    }

    /// Runs `f` in a thread of this namespace and waits for its result. Sockets that `f` opens stay in the
    /// namespace wherever they are used later.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })?
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn in_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, f)?;
        // A panic belongs to the caller, whose closure it was.
        thread.join().map_or_else(|panic| std::panic::resume_unwind(panic), Ok)
    })
}
