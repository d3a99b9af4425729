//! The version of a kernel.

use std::fmt;

/// A kernel version. Only the first two numbers order features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Release {
    /// 6 in 6.1.
    pub major: u32,
    /// 1 in 6.1.
    pub minor: u32,
}

impl Release {
    /// A version by its numbers.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Reads the text of `uname -r`, such as `6.1.0-18-amd64`; a missing minor number is 0.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Some(Self { major, minor })
    }

    /// The running kernel's; `None` when it calls itself something unheard of.
    pub fn running() -> Option<Self> {
        let names = nix::sys::utsname::uname().ok()?;
        Self::parse(names.release().to_str()?)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn releases_are_read_as_distributions_write_them() {
        for (text, release) in [
            ("6.1.0-18-amd64", Some(Release::new(6, 1))),
            ("5.15.0-1063-aws\n", Some(Release::new(5, 15))),
            ("3.10.0-1160.el7.x86_64", Some(Release::new(3, 10))),
            ("6.12-rc3", Some(Release::new(6, 12))),
            ("7", Some(Release::new(7, 0))),
            ("", None),
            ("linux", None),
            ("99999999999.1", None),
        ] {
            assert_eq!(Release::parse(text), release, "{text}");
        }
        assert!(Release::running().is_some_and(|release| release > Release::new(2, 6)));
        assert!(Release::new(5, 10) > Release::new(5, 9));
    }

    proptest! {
        #[test]
        fn any_release_text_is_survived(text in ".*") {
            let _ = Release::parse(&text);
        }
    }
}
