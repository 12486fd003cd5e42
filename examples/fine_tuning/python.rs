//! What chat templates expect of Python: how it writes values, JSON and the date.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{escape_formatter, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use std::fmt::Write as _;
use std::io::{self, Write};

fn invalid(message: impl ToString) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}

/// What `{{ value }}` writes.
pub fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// The date and the time here, as `strftime` writes them.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| invalid(format!("strftime_now cannot write {format:?}")))?;
    Ok(text)
}

/// `json.dumps` with the arguments that transformers takes.
pub fn to_json(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<(String, String)> =
        match options.get::<Option<Vec<String>>>("separators")? {
            None => None,
            Some(given) => match <[String; 2]>::try_from(given) {
                Ok([item, key]) => Some((item, key)),
                Err(_) => return Err(invalid("separators are two strings")),
            },
        };
    options.assert_all_used()?;
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (item.into(), ": ".into()));
    let mut json = serde_json::to_value(value).map_err(invalid)?;
    if sorted == Some(true) {
        json.sort_all_objects();
    }
    let mut written = Vec::new();
    let format = Dumps {
        indent,
        depth: 0,
        empty: true,
        item,
        key,
        ascii: ascii == Some(true),
    };
    json.serialize(&mut Serializer::with_formatter(&mut written, format))
        .map_err(invalid)?;
    String::from_utf8(written).map_err(invalid)
}

/// JSON as Python writes it.
struct Dumps {
    indent: Option<usize>,
    depth: usize,
    /// Whether nothing is written yet of the array or object.
    empty: bool,
    item: String,
    key: String,
    ascii: bool,
}

impl Dumps {
    fn open<W: Write + ?Sized>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        w.write_all(bracket)
    }

    fn close<W: Write + ?Sized>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(w)?;
        }
        self.empty = false;
        w.write_all(bracket)
    }

    fn next<W: Write + ?Sized>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.line(w)
    }

    fn line<W: Write + ?Sized>(&self, w: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(w, "\n{}", " ".repeat(indent * self.depth)),
            None => Ok(()),
        }
    }
}

impl Formatter for Dumps {
    fn begin_array<W: Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }

    fn begin_object<W: Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }

    fn write_f64<W: Write + ?Sized>(&mut self, w: &mut W, value: f64) -> io::Result<()> {
        // Rust has the same digits. Python writes powers of ten below 1e-4 and from 1e16 on, of two digits or more.
        let magnitude = value.abs();
        if magnitude != 0. && !(1e-4..1e16).contains(&magnitude) {
            let text = format!("{value:e}");
            if let Some((digits, power)) = text.split_once('e') {
                let (sign, power) = match power.strip_prefix('-') {
                    Some(power) => ('-', power),
                    None => ('+', power),
                };
                return write!(w, "{digits}e{sign}{power:0>2}");
            }
        }
        write!(w, "{value:?}")
    }

    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        w: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for c in fragment.chars() {
            match c {
                ' '..='~' => write!(w, "{c}")?,
                _ if !self.ascii => write!(w, "{c}")?,
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(w, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        Ok(())
    }
}
