// A bundle's files as they were when it was opened: what was checked once may be read again later, and
// nothing else may be there by then.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "span.hpp"

namespace ojfa::core {

// A file descriptor, closed at its end.
class Descriptor {
 public:
    explicit Descriptor(int number) : number_(number) {}
    ~Descriptor();
    Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
    Descriptor& operator=(Descriptor&&) = delete;

    int number() const { return number_; }

 private:
    int number_;
};

// A plain file of at most so many bytes, whole. Links, pipes, devices and sockets are refused, and nothing is
// waited for. Throws Failure.
std::string read_plain(const std::filesystem::path& path, std::uint64_t most);

// What tells a file from any other, and from itself before it was written to.
struct FileState {
    explicit FileState(const struct stat& status);
    bool operator==(const FileState& other) const;

    std::uint64_t device, inode, size;
    std::int64_t modified, modified_ns, changed, changed_ns;
};

// A file that is read in order, the system some way ahead.
class HeldFile {
 public:
    // Bytes read, as many as there is room for but at the end. Throws Failure where they can't be read, or
    // may be others than when the bundle was opened.
    std::size_t read(Span<char> room);

 private:
    friend class HeldFiles;
    HeldFile(Descriptor descriptor, std::filesystem::path path, const FileState& state, std::uint64_t start);
    void check_unchanged() const;

    Descriptor descriptor_;
    std::filesystem::path path_;
    const FileState& state_;
    std::uint64_t position_, advised_;
};

// The files of a directory. Any thread.
class HeldFiles {
 public:
    // Holds the directory itself, so that another one under its name changes nothing. Throws Failure.
    explicit HeldFiles(std::filesystem::path directory);

    // Holds a plain file as it is now; false where there is none of that name. Throws Failure.
    bool hold(const std::string& name);

    // Opens a file that is held, to read from an offset on; one object is for one thread, and not for longer
    // than this one. Throws Failure where the file is no longer the same.
    HeldFile open(const std::string& name, std::uint64_t start = 0) const;

    // So many bytes of a held file; all that follow the offset without a number.
    std::vector<char> read(const std::string& name, std::uint64_t offset, std::uint64_t bytes) const;
    std::vector<char> read(const std::string& name) const;

    std::uint64_t size(const std::string& name) const { return states_.at(name).size; }
    const std::filesystem::path& directory() const { return directory_; }

 private:
    std::filesystem::path directory_;
    Descriptor descriptor_;
    std::map<std::string, FileState> states_;
};

}  // namespace ojfa::core
