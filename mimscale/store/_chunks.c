/* The loop over the chunks of some boxes of one shard: read, check, decode, put in place.
 *
 * What takes time in a crop of 64 chunks is 64 times the Python between two C calls. Here one call does them all and
 * holds the GIL only to ask for bytes. The work itself is that of libraries, whose functions are passed as addresses:
 * `blosc_decompress_ctx` of C-Blosc, `LZ4_decompress_safe` of LZ4 and `crc32c_extend` of crc32c. No state outlives a call
 * but the handler in `_guard.h`, and no thread is started, so that a process may fork at any time.
 *
 * Nothing that comes from a file is trusted: the crc32c is checked first, then the sizes in Blosc's header against those
 * that are expected, and the libraries are told how much they may read and write. What comes from Python is checked too.
 *
 *     C channels | Z Y X voxels; all lengths, offsets and strides in bytes unless named otherwise
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/uio.h>
#include <sys/vfs.h>
#endif

#include "_guard.h"

#define EMPTY UINT64_MAX
#define CRC_BYTES 4
#define CRC_RESIDUE 0x48674BC7u /* the crc32c of any data with its own crc32c behind it */
#define BLOSC_HEADER_BYTES 16
#define MOST_EDGE_VOXELS 1024
#define CHUNKS_AT_ONCE 4 /* decoded before they are put in place; all must stay in a cache of the core */

typedef int (*Decompress)(const void *from, void *to, size_t most, int threads);
typedef uint32_t (*Crc32c)(uint32_t crc, const uint8_t *data, size_t count);

typedef int (*Lz4)(const char *from, char *to, int count, int most);

typedef struct {
    Py_buffer view;                  /* [C, Z, Y, X], where its voxels go */
    Py_ssize_t low[3], stop[3];      /* of the shard's voxels along Z, Y, X */
} Box;

typedef struct {                     /* what one box takes of one chunk */
    uint64_t offset, length;         /* of the encoded chunk in the shard */
    Py_ssize_t number;               /* in C order of the chunk grid */
    const Box *box;
} Piece;

/* A chunk that is decoded, or the fill value. */
typedef struct {
    const char *voxels;              /* NULL: in its place */
    const char *high;                /* NULL; or the second byte of each voxel, and `voxels` holds only the first ones */
} Decoded;

typedef struct {
    Decompress decompress;
    Lz4 lz4;                         /* NULL: not known */
    Crc32c crc32c;
    Py_ssize_t grid[4];              /* chunks along C, Z, Y, X */
    Py_ssize_t edge;                 /* voxels of a chunk along Z, Y and X */
    Py_ssize_t voxel, row, plane, chunk;
    Box *boxes;
    Py_ssize_t num_boxes;
    Piece *pieces;
    Py_ssize_t num_pieces;
    char *scratch;                   /* decoded chunks */
    Decoded *decoded;                /* the chunks of the pieces that are worked on */
    const uint8_t *data;             /* what was read of the shard, or all of it as a mapping ... */
    uint64_t base;                   /* ... from this byte on */
    uint8_t *copy;                   /* encoded chunks of a mapping; NULL: `data` is no mapping */
    Py_ssize_t longest;              /* of them */
    uint64_t gap, most;              /* of a run: between its chunks, and in all */
    Py_ssize_t num_decoded, bytes_copied;
} Work;

/* ---------------------------------------------------------------------------------------------- placing voxels */

/* A box's piece of a chunk as two places in memory. */
typedef struct {
    char *to;
    Decoded from;
    Py_ssize_t count[3];             /* voxels along Z, Y, X */
    Py_ssize_t stride[2];            /* of `from` along Z, Y */
} Copy;

static Copy copy_of(const Work *work, const Piece *piece, Decoded from, int repeats)
{
    const Box *box = piece->box;
    /* Of bytes that lie apart, a row is half as long. */
    const Py_ssize_t parts = from.high ? 2 : 1;
    const Py_ssize_t stride[3] = {repeats ? 0 : work->plane / parts, repeats ? 0 : work->row / parts,
                                  repeats ? 0 : work->voxel / parts};
    Copy copy = {box->view.buf, from, {0}, {stride[0], stride[1]}};
    Py_ssize_t number = piece->number, skipped = 0;
    for (int axis = 2; axis >= 0; axis--) {
        Py_ssize_t corner = number % work->grid[axis + 1] * work->edge;
        number /= work->grid[axis + 1];
        Py_ssize_t first = corner > box->low[axis] ? corner : box->low[axis];
        Py_ssize_t stop = corner + work->edge < box->stop[axis] ? corner + work->edge : box->stop[axis];
        copy.count[axis] = stop - first;
        copy.to += (first - box->low[axis]) * box->view.strides[axis + 1];
        skipped += (first - corner) * stride[axis];
    }
    copy.to += number * box->view.strides[0]; /* what is left is the channel */
    copy.from.voxels += skipped;
    if (from.high)
        copy.from.high += skipped;
    return copy;
}

/* Rows are short, and of one of a few lengths. What is a few moves must not become a call, nor a loop over bytes: a row is
 * its beginning and its end, of a length that the compiler knows, which may overlap. */
static inline void copy_ends(char *to, const char *from, size_t bytes, size_t part)
{
    memcpy(to, from, part);
    memcpy(to + bytes - part, from + bytes - part, part);
}

static inline void copy_row(char *to, const char *from, size_t bytes)
{
    if (bytes > 64)
        memcpy(to, from, bytes);
    else if (bytes >= 32)
        copy_ends(to, from, bytes, 32);
    else if (bytes >= 16)
        copy_ends(to, from, bytes, 16);
    else if (bytes >= 8)
        copy_ends(to, from, bytes, 8);
    else if (bytes >= 4)
        copy_ends(to, from, bytes, 4);
    else if (bytes >= 2)
        copy_ends(to, from, bytes, 2);
    else
        *to = *from;
}

enum { MERGED = 16 };

/* Join the bytes of voxels of two bytes, which lie apart; written so that compilers make a few vector operations of it. */
static inline void merge(char *to, const uint8_t *low, const uint8_t *high)
{
    uint16_t voxels[MERGED];
    for (int n = 0; n < MERGED; n++)
        voxels[n] = (uint16_t)(low[n] | high[n] << 8);
    memcpy(to, voxels, sizeof voxels);
}

static inline void merge_row(char *restrict to, const char *restrict low, const char *restrict high, Py_ssize_t count)
{
    const uint8_t *one = (const uint8_t *)low, *other = (const uint8_t *)high;
    Py_ssize_t voxel = 0;
    for (; voxel + MERGED <= count; voxel += MERGED)
        merge(to + 2 * voxel, one + voxel, other + voxel);
    if (voxel < count && count >= MERGED) { /* some of them again, rather than the rest one by one */
        voxel = count - MERGED;
        merge(to + 2 * voxel, one + voxel, other + voxel);
        return;
    }
    for (; voxel < count; voxel++) {
        to[2 * voxel] = low[voxel];
        to[2 * voxel + 1] = high[voxel];
    }
}

/* Put pieces that lie side by side along X in place: row by row of the box, so that memory is written in order. */
static void place(const Work *work, const Copy *copies, Py_ssize_t num_copies, const Py_ssize_t *to_stride)
{
    for (Py_ssize_t z = 0; z < copies[0].count[0]; z++)
        for (Py_ssize_t y = 0; y < copies[0].count[1]; y++)
            for (Py_ssize_t n = 0; n < num_copies; n++) {
                const Copy *copy = &copies[n];
                char *to = copy->to + z * to_stride[1] + y * to_stride[2];
                Py_ssize_t at = z * copy->stride[0] + y * copy->stride[1];
                if (copy->from.high)
                    merge_row(to, copy->from.voxels + at, copy->from.high + at, copy->count[2]);
                else
                    copy_row(to, copy->from.voxels + at, (size_t)(copy->count[2] * work->voxel));
            }
}

/* Where a chunk may be decoded straight into its box, or NULL: all of it is wanted, and lies there without a gap. */
static char *own_place(const Work *work, const Piece *piece)
{
    const Box *box = piece->box;
    const Py_ssize_t *strides = box->view.strides;
    Py_ssize_t number = piece->number;
    char *to = box->view.buf;
    if (strides[2] != work->row || strides[1] != work->plane)
        return NULL;
    for (int axis = 2; axis >= 0; axis--) {
        Py_ssize_t corner = number % work->grid[axis + 1] * work->edge;
        number /= work->grid[axis + 1];
        if (corner < box->low[axis] || corner + work->edge > box->stop[axis])
            return NULL;
        to += (corner - box->low[axis]) * strides[axis + 1];
    }
    return to + number * strides[0];
}

/* ------------------------------------------------------------------------------------------------ decoding */

static uint32_t little_endian_32(const uint8_t *at)
{
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Decode a chunk that Blosc has compressed with LZ4 in one block, as it is with the preset for speed. Blosc would copy
 * what did not get smaller (noise: the low bytes of a CT), then join the bytes of all voxels, wanted or not; here they
 * stay apart in `scratch` until they are put in place. Returns 0 for anything else, which is left to Blosc. */
static int decode_lz4(const Work *work, const uint8_t *data, uint64_t length, char *scratch, Decoded *decoded)
{
    enum { VERSION = 2, LZ4_VERSION = 1, LZ4_FORMAT = 1 << 5, FORMATS = 7 << 5 };
    enum { BYTES_APART = 1, STORED = 2, BITS_APART = 4, IN_ONE_PART = 16 };
    const int flags = data[2];
    if (data[0] == VERSION && flags & STORED && length == BLOSC_HEADER_BYTES + (uint64_t)work->chunk) {
        *decoded = (Decoded){(const char *)data + BLOSC_HEADER_BYTES, NULL};
        return 1;
    }
    if (data[0] != VERSION || data[1] != LZ4_VERSION || (flags & FORMATS) != LZ4_FORMAT || flags & (BITS_APART | STORED))
        return 0;
    if (work->voxel > 2 || data[3] != work->voxel || (work->voxel == 2 && !(flags & BYTES_APART)))
        return 0;
    if (little_endian_32(data + 8) != (uint64_t)work->chunk || length < BLOSC_HEADER_BYTES + 4)
        return 0;
    const Py_ssize_t parts = flags & IN_ONE_PART ? 1 : work->voxel, part_bytes = work->chunk / parts;
    const char *part[2] = {NULL, NULL};
    uint64_t at = little_endian_32(data + BLOSC_HEADER_BYTES); /* where the block begins */
    for (Py_ssize_t n = 0; n < parts; n++) {
        if (at > length || length - at < 4)
            return 0;
        uint64_t size = little_endian_32(data + at);
        at += 4;
        if (size > length - at)
            return 0;
        part[n] = (const char *)data + at;
        if (size != (uint64_t)part_bytes) { /* else it is stored as it is */
            char *place = scratch + n * part_bytes;
            if (work->lz4(part[n], place, (int)size, (int)part_bytes) != part_bytes)
                return 0;
            part[n] = place;
        }
        at += size;
    }
    decoded->voxels = part[0];
    decoded->high = work->voxel == 1 ? NULL : parts == 2 ? part[1] : part[0] + work->chunk / 2;
    return 1;
}

/* Check and decode one chunk, straight into `own` place where there is one and its bytes come out in order, else into
 * `scratch` or, of what did not get smaller, not at all. Returns 0 when it is damaged. */
static int decode(const Work *work, const uint8_t *data, uint64_t length, char *own, char *scratch, Decoded *decoded)
{
    if (length < BLOSC_HEADER_BYTES + CRC_BYTES || length > INT32_MAX)
        return 0;
    if (work->crc32c(0, data, length) != CRC_RESIDUE)
        return 0;
    length -= CRC_BYTES;
    /* Blosc trusts its header: it would fill a part of `to`, or read beyond the data, without a word. */
    if (little_endian_32(data + 4) != (uint64_t)work->chunk || little_endian_32(data + 12) != length)
        return 0;
    if (work->lz4 && decode_lz4(work, data, length, own && work->voxel == 1 ? own : scratch, decoded))
        return 1;
    *decoded = (Decoded){own ? own : scratch, NULL};
    return work->decompress(data, own ? own : scratch, (size_t)work->chunk, 1) == work->chunk;
}

/* The bytes of a chunk, or NULL when its mapping cannot be read. What is mapped is copied, a chunk at a time into the
 * core's own cache: nobody can change the bytes between their check and their use. */
static const uint8_t *encoded(Work *work, Py_ssize_t number, uint8_t *copy)
{
    const Piece *piece = &work->pieces[number];
    const uint8_t *at = work->data + (piece->offset - work->base);
    if (!work->copy)
        return at;
    if (!guarded_copy(copy, at, piece->length))
        return NULL;
    work->bytes_copied += (Py_ssize_t)piece->length;
    return copy;
}

/* Decode pieces [first, stop), whose bytes lie in `data`. Returns the first piece of a damaged chunk, or `stop`. */
static Py_ssize_t decode_run(Work *work, Py_ssize_t first, Py_ssize_t stop)
{
    while (first < stop) {
        /* Some chunks that lie side by side along X, so that whole rows of a box can be written. */
        const Piece *pieces = work->pieces;
        const Py_ssize_t line = pieces[first].number / work->grid[3];
        Py_ssize_t num_chunks = 0, next = first;
        for (; next < stop && pieces[next].number / work->grid[3] == line; next++) {
            Decoded *decoded = &work->decoded[next - first];
            if (next > first && pieces[next].number == pieces[next - 1].number) {
                *decoded = decoded[-1];
                continue;
            }
            if (num_chunks == CHUNKS_AT_ONCE)
                break;
            int is_shared = next + 1 < stop && pieces[next + 1].number == pieces[next].number;
            char *own = is_shared ? NULL : own_place(work, &pieces[next]);
            char *scratch = work->scratch + num_chunks * work->chunk;
            const uint8_t *data = encoded(work, next, work->copy + num_chunks * work->longest);
            num_chunks++;
            if (!data || !decode(work, data, pieces[next].length, own, scratch, decoded))
                return next;
            work->num_decoded++;
            if (decoded->voxels == own)
                decoded->voxels = NULL;
        }
        for (Py_ssize_t n = 0; n < work->num_boxes; n++) {
            Copy copies[CHUNKS_AT_ONCE];
            Py_ssize_t count = 0;
            for (Py_ssize_t each = first; each < next; each++)
                if (pieces[each].box == &work->boxes[n] && work->decoded[each - first].voxels)
                    copies[count++] = copy_of(work, &pieces[each], work->decoded[each - first], 0);
            if (count)
                place(work, copies, count, work->boxes[n].view.strides);
        }
        first = next;
    }
    return stop;
}

/* ------------------------------------------------------------------------------------------------ planning */

static int by_offset(const void *one, const void *other)
{
    const Piece *a = one, *b = other;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    if (a->number != b->number) /* two chunks at one place: only another writer does that */
        return a->number < b->number ? -1 : 1;
    return a->box < b->box ? -1 : a->box > b->box;
}

/* List what the boxes want of which chunk, sorted by where it lies; empty chunks are filled at once.
 * Returns 0, or -1 with an exception. */
static int plan(Work *work, const uint64_t *index, const char *fill_row)
{
    Py_ssize_t most = 0;
    for (Py_ssize_t n = 0; n < work->num_boxes; n++) {
        Py_ssize_t chunks = work->grid[0];
        for (int axis = 0; axis < 3; axis++)
            chunks *= (work->boxes[n].stop[axis] - 1) / work->edge - work->boxes[n].low[axis] / work->edge + 1;
        most += chunks; /* at most the grid for each box, and the grid lies in memory as index */
    }
    work->pieces = PyMem_New(Piece, most > 0 ? most : 1);
    if (!work->pieces) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t n = 0; n < work->num_boxes; n++) {
        const Box *box = &work->boxes[n];
        Py_ssize_t from[3], to[3];
        for (int axis = 0; axis < 3; axis++) {
            from[axis] = box->low[axis] / work->edge;
            to[axis] = (box->stop[axis] - 1) / work->edge + 1;
        }
        for (Py_ssize_t c = 0; c < work->grid[0]; c++)
            for (Py_ssize_t z = from[0]; z < to[0]; z++)
                for (Py_ssize_t y = from[1]; y < to[1]; y++)
                    for (Py_ssize_t x = from[2]; x < to[2]; x++) {
                        Py_ssize_t number = ((c * work->grid[1] + z) * work->grid[2] + y) * work->grid[3] + x;
                        Piece piece = {index[2 * number], index[2 * number + 1], number, box};
                        if (piece.offset == EMPTY) {
                            Copy air = copy_of(work, &piece, (Decoded){fill_row, NULL}, 1);
                            place(work, &air, 1, box->view.strides);
                        } else if (piece.length > UINT64_MAX - piece.offset || piece.offset + piece.length > PY_SSIZE_T_MAX) {
                            PyErr_SetString(PyExc_ValueError, "index: points beyond any file");
                            return -1;
                        } else
                            work->pieces[work->num_pieces++] = piece;
                    }
    }
    qsort(work->pieces, (size_t)work->num_pieces, sizeof(Piece), by_offset);
    return 0;
}

/* The end of the run of pieces that begins at `first` and is read at once, and where its bytes end. */
static Py_ssize_t end_of_run(const Work *work, Py_ssize_t first, uint64_t *end)
{
    const Piece *pieces = work->pieces;
    Py_ssize_t next = first + 1;
    *end = pieces[first].offset + pieces[first].length;
    for (; next < work->num_pieces; next++) {
        uint64_t stop = pieces[next].offset + pieces[next].length;
        if (pieces[next].number != pieces[next - 1].number) {
            if (pieces[next].offset > *end && pieces[next].offset - *end > work->gap)
                break;
            if (stop - pieces[first].offset > work->most)
                break;
        }
        if (stop > *end)
            *end = stop;
    }
    return next;
}

/* Tell `announce` of all ranges, when there are at least `least`. Returns 0, or -1 with an exception. */
static int announce_runs(const Work *work, PyObject *announce, Py_ssize_t least)
{
    PyObject *ranges = PyList_New(0);
    if (!ranges)
        return -1;
    uint64_t end;
    for (Py_ssize_t first = 0, next; first < work->num_pieces; first = next) {
        next = end_of_run(work, first, &end);
        uint64_t start = work->pieces[first].offset;
        PyObject *range = Py_BuildValue("(KK)", (unsigned long long)start, (unsigned long long)(end - start));
        if (!range || PyList_Append(ranges, range) < 0) {
            Py_XDECREF(range);
            Py_DECREF(ranges);
            return -1;
        }
        Py_DECREF(range);
    }
    PyObject *done = PyList_GET_SIZE(ranges) >= least ? PyObject_CallOneArg(announce, ranges) : Py_NewRef(Py_None);
    Py_DECREF(ranges);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Read and decode all runs. Returns None, or (number, encoded bytes) of a damaged chunk, or NULL with an exception. */
static PyObject *decode_all(Work *work, PyObject *read)
{
    uint64_t end;
    for (Py_ssize_t first = 0, next; first < work->num_pieces; first = next) {
        next = end_of_run(work, first, &end);
        uint64_t start = work->pieces[first].offset;
        PyObject *bytes = PyObject_CallFunction(read, "KK", (unsigned long long)start, (unsigned long long)(end - start));
        if (!bytes)
            return NULL;
        Py_buffer data;
        if (PyObject_GetBuffer(bytes, &data, PyBUF_SIMPLE) < 0) {
            Py_DECREF(bytes);
            return NULL;
        }
        PyObject *answer = NULL;
        if ((uint64_t)data.len < end - start) {
            PyErr_SetString(PyExc_ValueError, "source: returned fewer bytes than were asked for");
        } else {
            Py_ssize_t done;
            work->data = data.buf;
            work->base = start;
            Py_BEGIN_ALLOW_THREADS
            done = decode_run(work, first, next);
            Py_END_ALLOW_THREADS
            if (done == next)
                answer = Py_NewRef(Py_None);
            else {
                const Piece *bad = &work->pieces[done];
                const char *at = (const char *)data.buf + (bad->offset - start);
                answer = Py_BuildValue("(ny#)", bad->number, at, (Py_ssize_t)bad->length);
            }
        }
        PyBuffer_Release(&data);
        Py_DECREF(bytes);
        if (answer != Py_None)
            return answer;
        Py_DECREF(answer);
    }
    return Py_NewRef(Py_None);
}

/* The first piece of a run that does not begin in the page cache, or `num_pieces`; that too where the system cannot tell. */
static Py_ssize_t first_absent(const Work *work, int file, uint64_t position)
{
#ifdef RWF_NOWAIT
    uint64_t end;
    for (Py_ssize_t first = 0; first < work->num_pieces; first = end_of_run(work, first, &end)) {
        char byte;
        struct iovec one = {&byte, 1};
        ssize_t count = preadv2(file, &one, 1, (off_t)(position + work->pieces[first].offset), RWF_NOWAIT);
        if (count < 0 && errno == EAGAIN)
            return first;
        if (count < 0)
            break;
    }
#endif
    return work->num_pieces;
}

/* Decode all pieces out of a mapping of the shard, which lies in `file` from `position` on. Returns None, or (number, no
 * bytes) of a chunk that is damaged, cannot be read or does not lie in the page cache, or NULL with an exception. */
static PyObject *decode_mapping(Work *work, const Py_buffer *mapping, int file, uint64_t position)
{
    Py_ssize_t done = 0;
    uint64_t longest = 1, size = (uint64_t)mapping->len;
    for (; done < work->num_pieces && work->pieces[done].offset + work->pieces[done].length <= size; done++)
        if (work->pieces[done].length > longest)
            longest = work->pieces[done].length;
    if (done == work->num_pieces) {
        work->data = mapping->buf;
        work->longest = (Py_ssize_t)longest;
        work->copy = PyMem_Malloc(longest * CHUNKS_AT_ONCE);
        if (!work->copy)
            return PyErr_NoMemory();
        if (guard_bus_errors() < 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        Py_BEGIN_ALLOW_THREADS
        done = file < 0 ? work->num_pieces : first_absent(work, file, position);
        if (done == work->num_pieces)
            done = decode_run(work, 0, work->num_pieces);
        Py_END_ALLOW_THREADS
    }
    return done == work->num_pieces ? Py_NewRef(Py_None) : Py_BuildValue("(ny#)", work->pieces[done].number, "", (Py_ssize_t)0);
}

/* ------------------------------------------------------------------------------------------------ the call */

static int refuse(const char *why)
{
    PyErr_SetString(PyExc_ValueError, why);
    return -1;
}

/* Take over the boxes, a list of (low, stop, view). Returns 0, or -1 with an exception. */
static int take_boxes(Work *work, PyObject *list)
{
    Py_ssize_t count = PyList_GET_SIZE(list);
    work->boxes = PyMem_New(Box, count > 0 ? count : 1);
    if (!work->boxes) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        Box *box = &work->boxes[n];
        PyObject *view;
        PyObject *item = PyList_GET_ITEM(list, n);
        if (!PyTuple_Check(item))
            return refuse("boxes: not a tuple");
        if (!PyArg_ParseTuple(item, "(nnn)(nnn)O", &box->low[0], &box->low[1], &box->low[2], &box->stop[0],
                              &box->stop[1], &box->stop[2], &view))
            return -1;
        if (PyObject_GetBuffer(view, &box->view, PyBUF_STRIDED | PyBUF_WRITABLE) < 0)
            return -1;
        work->num_boxes = n + 1; /* from here on it is released */
        if (box->view.ndim != 4 || box->view.shape[0] != work->grid[0] || box->view.itemsize != work->voxel ||
            box->view.strides[3] != work->voxel)
            return refuse("boxes: a view is not [C, Z, Y, X] of the voxels of the shard with rows without gaps");
        for (int axis = 0; axis < 3; axis++) {
            Py_ssize_t low = box->low[axis], stop = box->stop[axis];
            if (low < 0 || low >= stop || stop > work->grid[axis + 1] * work->edge ||
                stop - low != box->view.shape[axis + 1])
                return refuse("boxes: a box is empty, reaches beyond the chunks, or is not as large as its view");
        }
    }
    return 0;
}

PyDoc_STRVAR(read_boxes_doc,
"read_boxes(decompress, lz4, crc32c, index, grid, edge, fill, boxes, gap_bytes, largest_read_bytes, announce, source, file, position)\n\n"
"Decode the chunks that boxes touch; see the stub.");

static PyObject *read_boxes(PyObject *module, PyObject *arguments)
{
    (void)module;
    unsigned long long decompress, lz4, crc32c, position;
    int file;
    PyObject *list, *announce, *source, *answer = NULL, *result = NULL;
    Py_buffer index = {0}, fill = {0}, mapping = {0};
    Work work = {0};
    char *fill_row = NULL;
    if (!PyArg_ParseTuple(arguments, "KKKy*(nnnn)ny*O!KKOOiK", &decompress, &lz4, &crc32c, &index, &work.grid[0], &work.grid[1],
                          &work.grid[2], &work.grid[3], &work.edge, &fill, &PyList_Type, &list, &work.gap, &work.most, &announce,
                          &source, &file, &position))
        return NULL;
    work.decompress = (Decompress)(uintptr_t)decompress;
    work.lz4 = (Lz4)(uintptr_t)lz4;
    work.crc32c = (Crc32c)(uintptr_t)crc32c;
    if (!work.decompress || !work.crc32c) {
        refuse("decompress, crc32c: no address");
        goto done;
    }
    if (work.edge < 1 || work.edge > MOST_EDGE_VOXELS || fill.len < 1 || fill.len > 8) {
        refuse("edge, fill: no chunk of voxels");
        goto done;
    }
    Py_ssize_t entries = index.len / 16, chunks = 1;
    for (int axis = 0; axis < 4; axis++) {
        if (work.grid[axis] < 1 || work.grid[axis] > entries / chunks) {
            refuse("grid: not that of the index");
            goto done;
        }
        chunks *= work.grid[axis];
    }
    if (chunks != entries || index.len % 16 || (uintptr_t)index.buf % sizeof(uint64_t)) {
        refuse("index: not [chunks, 2] of 64 bits");
        goto done;
    }
    work.voxel = fill.len;
    work.row = work.edge * work.voxel;
    work.plane = work.edge * work.row;
    work.chunk = work.edge * work.plane;
    if (work.chunk > INT32_MAX) {
        refuse("edge: a chunk is larger than Blosc can decode");
        goto done;
    }
    if (take_boxes(&work, list) < 0)
        goto done;
    if (!PyCallable_Check(source) && PyObject_GetBuffer(source, &mapping, PyBUF_SIMPLE) < 0)
        goto done;
    work.scratch = PyMem_Malloc((size_t)work.chunk * CHUNKS_AT_ONCE);
    work.decoded = PyMem_New(Decoded, work.num_boxes * CHUNKS_AT_ONCE + 1);
    fill_row = PyMem_Malloc((size_t)work.row);
    if (!work.scratch || !work.decoded || !fill_row) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t voxel = 0; voxel < work.edge; voxel++)
        memcpy(fill_row + voxel * work.voxel, fill.buf, (size_t)work.voxel);
    if (plan(&work, index.buf, fill_row) < 0)
        goto done;
    if (announce != Py_None && announce_runs(&work, announce, mapping.obj ? 1 : 2) < 0)
        goto done;
    answer = mapping.obj ? decode_mapping(&work, &mapping, file, (uint64_t)position) : decode_all(&work, source);
    if (answer)
        result = Py_BuildValue("(nNn)", work.num_decoded, answer, work.bytes_copied);
done:
    PyMem_Free(work.copy);
    PyMem_Free(work.scratch);
    PyMem_Free(work.decoded);
    PyMem_Free(fill_row);
    PyMem_Free(work.pieces);
    for (Py_ssize_t n = 0; n < work.num_boxes; n++)
        PyBuffer_Release(&work.boxes[n].view);
    PyMem_Free(work.boxes);
    PyBuffer_Release(&mapping);
    PyBuffer_Release(&fill);
    PyBuffer_Release(&index);
    return result;
}

PyDoc_STRVAR(file_system_doc, "file_system(file)\n\nWhat kind of file system an open file lies on; see the stub.");

static PyObject *file_system(PyObject *module, PyObject *argument)
{
    (void)module;
    int file = PyObject_AsFileDescriptor(argument);
    if (file < 0)
        return NULL;
#ifdef __linux__
    struct statfs status;
    if (fstatfs(file, &status) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLong((unsigned long)status.f_type & 0xFFFFFFFFu);
#else
    return PyLong_FromLong(0);
#endif
}

static PyMethodDef methods[] = {
    {"read_boxes", read_boxes, METH_VARARGS, read_boxes_doc},
    {"file_system", file_system, METH_O, file_system_doc},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_chunks", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__chunks(void)
{
    return PyModule_Create(&module);
}
