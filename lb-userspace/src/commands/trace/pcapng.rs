//! A capture file, as `draft-ietf-opsawg-pcapng` has it, which tcpdump and
//! Wireshark read: frames with comments, each from an interface that says at which
//! hook it was seen, and whether before or after.
//!
//! Of the format this is what is needed: a section, interfaces as they appear, and
//! frames. Numbers are in the order of this machine, which the first block tells.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::{Duration, SystemTime},
};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;

const END_OF_OPTIONS: u16 = 0;
const COMMENT: u16 = 1;
const APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const TIME_RESOLUTION: u16 = 9;

const ETHERNET: u16 = 1;

/// A file that is being written.
pub(super) struct PcapNg<W> {
    to: W,
    snaplen: u32,
    /// Numbers of interfaces, in the order of their appearance, by name.
    interfaces: BTreeMap<String, u32>,
}

/// One frame.
pub(super) struct Frame<'a> {
    pub(super) interface: String,
    pub(super) at: SystemTime,
    pub(super) bytes: &'a [u8],
    /// Of the whole frame, in bytes.
    pub(super) length: u32,
    pub(super) comment: &'a str,
}

impl<W: Write> PcapNg<W> {
    /// Begins a file.
    pub(super) fn new(mut to: W, snaplen: u32) -> io::Result<Self> {
        let mut body = Vec::new();
        body.extend(0x1a2b_3c4d_u32.to_ne_bytes());
        body.extend(1_u16.to_ne_bytes());
        body.extend(0_u16.to_ne_bytes());
        // Nobody knows how long it will be.
        body.extend(u64::MAX.to_ne_bytes());
        put_option(
            &mut body,
            APPLICATION,
            concat!("klb ", env!("CARGO_PKG_VERSION")).as_bytes(),
        );
        put_option(&mut body, END_OF_OPTIONS, &[]);
        put_block(&mut to, SECTION_HEADER, &body)?;
        Ok(Self {
            to,
            snaplen,
            interfaces: BTreeMap::new(),
        })
    }

    /// Adds a frame.
    pub(super) fn write(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        let interface = self.interface(&frame.interface)?;
        let since = frame.at.duration_since(SystemTime::UNIX_EPOCH);
        let time = since.unwrap_or(Duration::ZERO).as_nanos() as u64;
        let mut body = Vec::with_capacity(frame.bytes.len() + 64);
        for word in [
            interface,
            (time >> 32) as u32,
            time as u32,
            frame.bytes.len() as u32,
            frame.length.max(frame.bytes.len() as u32),
        ] {
            body.extend(word.to_ne_bytes());
        }
        put_padded(&mut body, frame.bytes);
        put_option(&mut body, COMMENT, frame.comment.as_bytes());
        put_option(&mut body, END_OF_OPTIONS, &[]);
        put_block(&mut self.to, ENHANCED_PACKET, &body)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// The number of an interface, which is described before its first frame.
    fn interface(&mut self, name: &str) -> io::Result<u32> {
        /// A negative power of ten: nanoseconds.
        const NANOSECONDS: u8 = 9;
        if let Some(number) = self.interfaces.get(name) {
            return Ok(*number);
        }
        let mut body = Vec::new();
        body.extend(ETHERNET.to_ne_bytes());
        body.extend(0_u16.to_ne_bytes());
        body.extend(self.snaplen.to_ne_bytes());
        put_option(&mut body, INTERFACE_NAME, name.as_bytes());
        put_option(&mut body, TIME_RESOLUTION, &[NANOSECONDS]);
        put_option(&mut body, END_OF_OPTIONS, &[]);
        put_block(&mut self.to, INTERFACE_DESCRIPTION, &body)?;
        let number = self.interfaces.len() as u32;
        self.interfaces.insert(name.to_owned(), number);
        Ok(number)
    }
}

/// A block's length stands before and behind it.
fn put_block(to: &mut impl Write, kind: u32, body: &[u8]) -> io::Result<()> {
    let length = (body.len() as u32 + 12).to_ne_bytes();
    to.write_all(&kind.to_ne_bytes())?;
    to.write_all(&length)?;
    to.write_all(body)?;
    to.write_all(&length)
}

fn put_option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_ne_bytes());
    body.extend((value.len() as u16).to_ne_bytes());
    put_padded(body, value);
}

/// Everything begins at a multiple of four bytes.
fn put_padded(body: &mut Vec<u8>, value: &[u8]) {
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn datagram(payload: usize) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([192, 0, 2, 9], [10, 96, 0, 1], 64)
            .udp(40_000, 53);
        let mut bytes = Vec::new();
        builder
            .write(&mut bytes, &vec![0; payload])
            .expect("a frame");
        bytes
    }

    fn file(frames: &[(&str, &[u8], u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut file = PcapNg::new(&mut bytes, 256).expect("begun");
        for (interface, frame, length) in frames {
            let frame = Frame {
                interface: (*interface).to_owned(),
                at: SystemTime::UNIX_EPOCH + Duration::new(86_400, 123_456_789),
                bytes: frame,
                length: *length,
                comment: "new_flow default/web",
            };
            file.write(&frame).expect("written");
        }
        bytes
    }

    #[test]
    fn blocks_tell_their_length_at_both_ends_and_are_padded() {
        let frame = datagram(3);
        let bytes = file(&[
            ("eth0 xdp before", &frame, 45),
            ("eth0 xdp after", &frame, 45),
        ]);
        let word =
            |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let (mut kinds, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let length = word(at + 4) as usize;
            assert_eq!(length % 4, 0);
            assert_eq!(word(at + length - 4) as usize, length);
            kinds.push(word(at));
            at += length;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(
            kinds,
            [SECTION_HEADER, 1, 6, 1, 6],
            "each interface before its frame"
        );
    }

    /// That tcpdump agrees is a test with real packets (`netns/trace.rs`).
    #[test]
    fn a_frame_has_its_time_its_lengths_and_a_comment() {
        let frame = datagram(5);
        let bytes = file(&[("eth0 xdp before", &frame[..44], 47)]);
        let block = bytes
            .windows(4)
            .rposition(|word| word == 44_u32.to_ne_bytes());
        let block = &bytes[block.expect("its length") - 20..];
        let words: Vec<u32> = block
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect();
        let time = 86_400_123_456_789_u64;
        let expected = [
            ENHANCED_PACKET,
            words[1],
            0,
            (time >> 32) as u32,
            time as u32,
        ];
        assert_eq!(words[..5], expected);
        assert_eq!(words[5..7], [44, 47], "captured, and as it was");
        assert_eq!(block[28..72], frame[..44]);
        let comment = b"new_flow default/web";
        assert_eq!(block[76..76 + comment.len()], comment[..]);
    }
}
