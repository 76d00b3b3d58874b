//! An object without what nobody reads who loads it.

use object::{
    build::elf::{Builder, Section, SectionData},
    elf::SHT_STRTAB,
};

/// The object less its DWARF. BTF is made of that, so the compiler has to write
/// it, but what the kernel, aya and bpftool read is in `.BTF` and `.BTF.ext`:
/// names and types of fields, and the lines of the source that a verifier's log
/// and `bpftool prog dump` show. DWARF is three quarters of an object.
///
/// # Errors
/// If it is no ELF object.
pub(super) fn without_dwarf(object: &[u8]) -> object::build::Result<Vec<u8>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        section.delete = is_dwarf(section);
    }
    // The compiler has one table for the names of symbols and of sections, the
    // builder wants two.
    let mut sections = builder.sections.iter();
    if !sections.any(|section| matches!(section.data, SectionData::SectionString)) {
        add_table(
            &mut builder,
            ".shstrtab",
            SHT_STRTAB,
            SectionData::SectionString,
        );
    }
    let mut lean = Vec::new();
    builder.write(&mut lean)?;
    Ok(lean)
}

fn add_table<'a>(builder: &mut Builder<'a>, name: &'a str, kind: u32, data: SectionData<'a>) {
    let table = builder.sections.add();
    table.name = name.into();
    table.sh_type = kind;
    table.sh_addralign = 1;
    table.data = data;
}

fn is_dwarf(section: &Section<'_>) -> bool {
    let name = section.name.as_slice();
    name.starts_with(b".debug_") || name.starts_with(b".rel.debug_")
}

#[cfg(test)]
mod tests {
    use object::{
        Endianness,
        elf::{ET_REL, SHT_PROGBITS, SHT_SYMTAB, STB_GLOBAL},
    };

    use super::*;

    /// An object with these sections, and a symbol in each.
    fn object(names: &[&str]) -> Vec<u8> {
        let mut builder = Builder::new(Endianness::Little, true);
        builder.header.e_type = ET_REL;
        for name in names {
            let data = SectionData::Data(name.as_bytes().into());
            add_table(&mut builder, name, SHT_PROGBITS, data);
            let section = builder.sections.iter().last().map(Section::id);
            let symbol = builder.symbols.add();
            symbol.name = (*name).into();
            symbol.set_st_info(STB_GLOBAL, 0);
            symbol.section = section;
        }
        add_table(&mut builder, ".strtab", SHT_STRTAB, SectionData::String);
        add_table(&mut builder, ".symtab", SHT_SYMTAB, SectionData::Symbol);
        let names = SectionData::SectionString;
        add_table(&mut builder, ".shstrtab", SHT_STRTAB, names);
        let mut bytes = Vec::new();
        builder.write(&mut bytes).expect("written");
        bytes
    }

    #[test]
    fn dwarf_goes_and_all_else_stays_as_it_is() {
        let kept = ["xdp", ".maps", ".BTF", ".BTF.ext"];
        let all = [
            "xdp",
            ".debug_info",
            ".maps",
            ".BTF",
            ".rel.debug_info",
            ".BTF.ext",
        ];
        let lean = without_dwarf(&object(&all)).expect("an object");
        assert_eq!(lean, object(&kept));
        assert_eq!(without_dwarf(&lean).expect("an object"), lean);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        without_dwarf(b"#!/bin/sh").expect_err("refused");
    }
}
