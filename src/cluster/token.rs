//! The bearer token in a file.
//!
//! It is read for every request: there are a few a minute, and so a token that was rotated, or put
//! right after the server had refused it, counts at once. A file that is gone or empty for a moment
//! leaves the last token in use, as in client-go (kubernetes/kubernetes issue 68164).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

/// A token file. Clones share what they know of it.
#[derive(Clone)]
pub struct TokenFile {
    path: Arc<Path>,
    last: Arc<Mutex<Last>>,
}

struct Last {
    header: HeaderValue,
    /// Trouble is told when it begins.
    told: bool,
}

impl TokenFile {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// Why there is no token in it; never its text.
    pub fn open(path: &Path) -> Result<Self, String> {
        let header = read(path)?;
        let last = Arc::new(Mutex::new(Last { header, told: false }));
        Ok(Self { path: path.into(), last })
    }

    /// Puts the token into the headers of a request.
    pub fn sign(&self, headers: &mut HeaderMap) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.path) {
            Ok(header) => *last = Last { header, told: false },
            Err(why) if !last.told => {
                tracing::warn!(file = %self.path.display(), why, "no new token, the last one stays in use");
                last.told = true;
            }
            Err(_) => {}
        }
        headers.insert(AUTHORIZATION, last.header.clone());
    }
}

fn read(path: &Path) -> Result<HeaderValue, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let token = text.trim();
    if token.is_empty() {
        return Err("it is empty".to_owned());
    }
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| "it holds characters that no token has".to_owned())?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::file::tests::TempFolder;

    #[test]
    fn the_file_of_now_counts_and_a_bad_one_leaves_the_last() {
        let folder = TempFolder::new("token");
        let path = folder.0.join("token");
        assert!(TokenFile::open(&path).is_err());
        std::fs::write(&path, " \n").unwrap();
        assert_eq!(TokenFile::open(&path).err().unwrap(), "it is empty");
        std::fs::write(&path, "first\n").unwrap();
        let file = TokenFile::open(&path).unwrap();
        let signed = || {
            let mut headers = HeaderMap::new();
            file.sign(&mut headers);
            let header = headers.remove(AUTHORIZATION).unwrap();
            assert!(header.is_sensitive());
            header.to_str().unwrap().to_owned()
        };
        assert_eq!(signed(), "Bearer first");
        std::fs::write(&path, "second").unwrap();
        assert_eq!(signed(), "Bearer second");
        for bad in ["", "a\nb\n"] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(signed(), "Bearer second");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(signed(), "Bearer second");
        std::fs::write(&path, "third").unwrap();
        assert_eq!(signed(), "Bearer third");
    }
}
