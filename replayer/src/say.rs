//! What roles say to people, on standard error. Whoever reads it may be gone, which ends no replay: `eprintln!` would panic.

/// A line.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

/// The same without the end of the line.
macro_rules! show {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = write!(std::io::stderr(), $($text)*);
    }};
}

pub(crate) use {say, show};
