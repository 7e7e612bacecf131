//! The two macros that give an enum of the vocabulary its words and its codes on the wire.

/// Gives an enum `ALL`, `name`, `Display` and `FromStr`. The words are those of its serialised form.
macro_rules! words {
    ($type:ident, $what:literal, { $($variant:ident => $word:literal),+ $(,)? }) => {
        impl $type {
            /// All values, in the order of their declaration.
            pub const ALL: &'static [$type] = &[$($type::$variant),+];

            /// The word for it in `/state`, in notices and on the command line.
            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$variant => $word,)+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::invalid::Invalid;

            /// Reads the word that `name` gives.
            fn from_str(word: &str) -> Result<Self, Self::Err> {
                match word {
                    $($word => Ok($type::$variant),)+
                    _ => Err($crate::invalid::Invalid::unknown(
                        $what,
                        format_args!("{word:?}"),
                        &[$($word),+],
                    )),
                }
            }
        }
    };
}

/// Gives an enum its protobuf twin, whose value 0 is `Unspecified`.
macro_rules! wire {
    ($type:ident, $pb:ty, $what:literal, { $($variant:ident => $code:ident),+ $(,)? }) => {
        impl $type {
            /// Reads the code of `field`; `None` for an unspecified one, whose default the caller knows.
            pub fn from_wire(
                field: &str,
                code: i32,
            ) -> Result<Option<Self>, $crate::invalid::Invalid> {
                match <$pb>::try_from(code) {
                    $(Ok(<$pb>::$code) => Ok(Some($type::$variant)),)+
                    Ok(<$pb>::Unspecified) => Ok(None),
                    Err(_) => Err($crate::invalid::Invalid::unknown(
                        field,
                        code,
                        &[$($type::$variant.name()),+],
                    )),
                }
            }

            /// Reads the code of `field`, which must be specified.
            pub fn required(field: &str, code: i32) -> Result<Self, $crate::invalid::Invalid> {
                let unknown = || $crate::invalid::Invalid::unknown(
                    field,
                    code,
                    &[$($type::$variant.name()),+],
                );
                Self::from_wire(field, code)?.ok_or_else(unknown)
            }
        }

        impl From<$type> for $pb {
            fn from(value: $type) -> Self {
                match value {
                    $($type::$variant => <$pb>::$code,)+
                }
            }
        }

        impl TryFrom<$pb> for $type {
            type Error = $crate::invalid::Invalid;

            /// Refuses `Unspecified`.
            fn try_from(code: $pb) -> Result<Self, Self::Error> {
                Self::required($what, code as i32)
            }
        }
    };
}

pub(crate) use {wire, words};
